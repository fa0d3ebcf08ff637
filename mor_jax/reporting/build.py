"""Builds the report page: reads the runs, measures depths on validation text, and assembles the sections."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mor_jax.files import write_atomically
from mor_jax.reporting import depths, page, recursions, runs, sections

MOST_MEASURED = 6  # runs whose models are run over a text: each has to be compiled


def write_page(paths: Sequence[str], output: Path, tokens: int, report: Callable[[str], None]) -> None:
  """Writes the page, and a PNG of each plot into a folder beside it.

  Args:
    paths: folders of the runs.
    output: the page.
    tokens: validation tokens whose depths are looked at; 0: none.
    report: is told what happens.

  Raises:
    ConfigError: a folder is not a run folder, or the page cannot be written.
  """
  shown = runs.read(paths)
  runs.check_writable(output)
  measured = _measure(shown, tokens, report)
  figures = sections.Plots(output.with_name(f'{output.stem}_plots'))
  title = shown[0].label if len(shown) == 1 else f'{len(shown)} runs'
  text = page.document(
    f'mor_jax: {title}',
    ', '.join(run.label for run in shown),
    [
      sections.overview(shown),
      sections.result(shown),
      sections.losses(shown, figures),
      sections.evaluations(shown),
      sections.routers(shown, figures),
      recursions.section(shown, figures),
      sections.tokens(shown, measured, figures),
      sections.training(shown, figures),
      sections.costs(shown, figures),
      sections.settings(shown),
    ],
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(output, text)
  report(f'wrote {output} ({len(text) / 1e6:.1f} MB)')


def _measure(shown: list[runs.Run], tokens: int, report: Callable[[str], None]) -> list[depths.Measured]:
  """Depths of the tokens for each run, or why there are none."""
  routed = [run for run in shown if run.config.model.kind == 'mor']
  chosen = sorted(routed, key=_bits_per_byte)[:MOST_MEASURED] if len(routed) > MOST_MEASURED else routed
  measured, left_out = [], []
  for run in shown:
    report(f'{run.label}: {len(run.records):,} lines of metrics')
    if not tokens or (run in routed and run not in chosen):
      left_out += [run.label] if tokens else []
      measured.append((None, ''))
    else:
      measured.append(depths.measure(run, tokens))
  if left_out:
    why = f'the {MOST_MEASURED} runs of least validation loss are shown, not {", ".join(left_out)}'
    measured[shown.index(next(run for run in shown if run.label in left_out))] = (None, why)
  return measured


def _bits_per_byte(run: runs.Run) -> float:
  curve = run.curve('validation/nll')
  return float('inf') if curve is None else float(run.bits_per_byte(curve, 'validation').values[-1])
