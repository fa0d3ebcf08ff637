"""HTML building blocks of the page. Styles and plots are inline, so it needs no network."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.data.token_texts import token_texts
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.evaluation import depth
from mor_jax.reporting.plots import DEPTH_COLOURS

CANDIDATES = 3  # tokens told of each recursion
STYLES = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere; background: #f4f5f7; color: #22272e; font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif; }
header { background: #1f2a3a; color: #fff; padding: 28px max(24px, calc(50vw - 566px)); }
header h1 { margin: 0; font-size: 24px; font-weight: 650; }
header p { margin: 4px 0 0; color: #b9c4d3; max-height: 4.5em; overflow: hidden; }
main { max-width: 1180px; margin: 0 auto; padding: 8px 24px 60px; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 18px 22px; margin-top: 18px; }
h2 { margin: 0 0 4px; font-size: 17px; }
h3 { margin: 16px 0 4px; font-size: 14px; color: #3c434d; }
p.lead { margin: 0 0 10px; color: #5d6570; max-width: 80ch; }
p.note { background: #fff7e0; border-left: 3px solid #e0a800; margin: 8px 0; padding: 6px 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
.scroll { overflow-x: auto; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #eef0f3; }
thead th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; line-height: 1.25; }
tbody tr:hover { background: #f7f9fc; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11ch; }
.wraps td { white-space: normal; }
th { color: #5d6570; font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 0 36px; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; padding: 2px 12px; margin-right: 4px; border-radius: 12px; background: #eef0f3;
  color: #3c434d; font-size: 13px; cursor: pointer; max-width: 100%; }
.tabs > input:checked + label { background: #1f2a3a; color: #fff; }
.tabs > input:focus-visible + label { outline: 2px solid #3b6fb6; }
.tabs > div { display: none; padding-top: 8px; }
svg { display: block; max-width: 1000px; height: auto; }
.text { font: 14px/1.9 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid #eef0f3; border-radius: 6px; padding: 10px 14px; max-height: 460px; overflow-y: auto; }
.text span { border-radius: 2px; cursor: default; }
.text span:hover, .text span:focus { outline: 1.5px solid #22272e; }
.told i { display: none; position: fixed; right: 16px; bottom: 16px; left: 16px; max-width: 900px; margin-left: auto; z-index: 1;
  padding: 8px 14px; border-radius: 8px; background: #1f2a3a; color: #fff; font-style: normal; font-size: 13px; line-height: 1.6; }
.told span:hover > i, .told:not(:hover) span:focus > i { display: block; }
@media (max-width: 640px) { header { padding: 20px 12px; } main { padding: 4px 8px 40px; } section { padding: 14px 12px; } }
.key span { display: inline-block; padding: 0 10px; margin-right: 6px; border-radius: 3px; font-size: 13px; }
"""

# Arrow keys go from token to token; everything else on the page works without scripts.
MOVES = """<script>
document.addEventListener('keydown', event => {
  const token = event.target.closest('.told > span');
  const next = token && { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling }[event.key];
  if (next) { event.preventDefault(); next.focus(); }
});
</script>"""


def document(title: str, subtitle: str, sections: Iterable[str]) -> str:
  """The whole page."""
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    f'<title>{html.escape(title)}</title><style>{STYLES}{_depth_styles()}</style></head><body>'
    f'<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>'
    f'<main>{"".join(sections)}</main>{MOVES}</body></html>\n'
  )


def section(title: str, lead: str, *parts: str) -> str:
  """A titled section of the page; '' if it has no parts."""
  if not any(parts):
    return ''
  lead = f'<p class="lead">{html.escape(lead)}</p>' if lead else ''
  return f'<section><h2>{html.escape(title)}</h2>{lead}{"".join(parts)}</section>'


def heading(text: str) -> str:
  """A heading within a section."""
  return f'<h3>{html.escape(text)}</h3>'


def paragraph(*sentences: str) -> str:
  """A paragraph with each sentence on its own line."""
  return ''.join(f'<p class="lead">{html.escape(text)}</p>' for text in sentences if text)


def notes(texts: Iterable[str]) -> str:
  """Highlighted notes for the reader."""
  return ''.join(f'<p class="note">{html.escape(text)}</p>' for text in texts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], wraps: bool = False) -> str:
  """A table; the first column is left-aligned. `wraps`: long cells take several lines."""
  head = ''.join(f'<th>{html.escape(name)}</th>' for name in columns)
  body = ''.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in rows)
  kind = 'scroll wraps' if wraps else 'scroll'
  return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def preformatted(text: str) -> str:
  """A text with its own line breaks."""
  return f'<div class="text">{html.escape(text)}</div>'


def columns(*parts: str) -> str:
  """Parts side by side, if there is room."""
  return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def tabs(name: str, panels: dict[str, str]) -> str:
  """Panels of which one is visible, selected by its label. Works without scripts."""
  if len(panels) < 2:
    return ''.join(panels.values())
  parts, rules = [], []
  for index, label in enumerate(panels):
    key, checked = f'{name}-{index}', ' checked' if index == 0 else ''
    parts.append(f'<input type="radio" name="{name}" id="{key}"{checked}>')
    parts.append(f'<label for="{key}">{html.escape(label)}</label>')
    rules.append(f'#{key}:checked ~ .{key} {{ display: block; }}')
  parts += [f'<div class="{name}-{index}">{panel}</div>' for index, panel in enumerate(panels.values())]
  return f'<style>{"".join(rules)}</style><div class="tabs">{"".join(parts)}</div>'


def coloured_text(tokenizer: Tokenizer, row: depth.RoutedRow, looks: Sequence[Mapping[str, Any]]) -> str:
  """A row's text with every token coloured by depth; what is known of it appears beside it on hover and focus.

  Args:
    looks: of every token of the row (`evaluation/recursions.py`); none: the model has nothing to tell.
  """
  spans, is_first = [], True
  real = np.flatnonzero(row.segments_T > 0)
  for index, text in zip(real, token_texts(tokenizer, row.tokens_T[real]), strict=True):
    taken = row.depth_T[index]
    is_begin = not index or row.segments_T[index - 1] != row.segments_T[index]
    before = looks[index - 1] if looks and not is_begin else None
    own = looks[index] if looks else {}
    card = _card(text, taken, row.scores_RT[:, index], before, own)
    focus = ' tabindex="0"' if is_first else ' tabindex="-1"'
    spans.append(f'<span class="d{taken}"{focus}>{html.escape(text)}{card}</span>')
    is_first = False
  return f'<div class="text told">{"".join(spans)}</div>'


def _card(
  text: str, taken: int, scores_R: np.ndarray, before: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> str:
  """What is known of a token; `before` is the token that it was predicted from."""
  lines = [f'{text!r}: {taken} recursion{"" if taken == 1 else "s"}']
  for step, best in enumerate(before['best'] if before else ()):
    said = ', '.join(f'{word!r} {100 * probability:.0f}%' for word, probability in best[:CANDIDATES])
    left = ' (where it left)' if step + 1 == before['depth'] else ''
    lines.append(f'after recursion {step + 1}{left}: {said}')
  if 'logits' in own:
    thought = zip(own['logits'], own['thresholds'], strict=True)
    lines.append('router: ' + ', '.join(f'{logit:.2f} (threshold {limit:.2f})' for logit, limit in thought))
  else:
    asked = ('not asked' if np.isnan(score) else f'{score:.3f}' for score in scores_R)
    lines.append(f'scores: {", ".join(asked)}')
  return f'<i>{html.escape(chr(10).join(lines))}</i>'


def depth_key(recursions: int) -> str:
  """The colour key for depths."""
  spans = ''.join(
    f'<span class="d{taken}">{taken} recursion{"" if taken == 1 else "s"}</span>'
    for taken in range(recursions + 1)
  )
  return f'<p class="key">{spans}</p>'


def _depth_styles() -> str:
  return ''.join(f'.d{taken} {{ background: {colour}; }}' for taken, colour in enumerate(DEPTH_COLOURS))
