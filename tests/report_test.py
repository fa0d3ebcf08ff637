"""The report: one page that needs nothing else, true to the files of the runs, and frank about what is missing."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import entry_points
import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from mor_jax.config import ConfigError
from mor_jax.data import loader
from mor_jax.evaluation import nll
from mor_jax.evaluation.depth import Word
from mor_jax.reporting import plots, runs, sections
from mor_jax.runs.restore import load_run


@pytest.fixture(scope='module')
def page(finished_run, tmp_path_factory):
  """The page of the finished run, and its folder."""
  output = tmp_path_factory.mktemp('report') / 'page.html'
  return write(output, str(finished_run[1])), output.parent


def write(output, *folders: str, tokens: int = 64) -> str:
  report = entry_points.load('mor_jax.report')
  with flagsaver.flagsaver(output=str(output), tokens=tokens):
    report.main(list(folders))
  return output.read_text()


@pytest.fixture
def copied_run(finished_run, tmp_path):
  folder = tmp_path / 'copied'
  shutil.copytree(finished_run[1], folder)
  return folder


def test_page_needs_no_network(page):
  text, _ = page
  assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
  assert not re.findall(
    r'fetch|import|XMLHttp', ''.join(re.findall(r'<script>.*?</script>', text, re.DOTALL))
  )
  assert 'url(' not in re.sub(r'url\(#[^)]*\)', '', text)


def test_every_plot_has_a_picture_beside_the_page(page):
  text, folder = page
  names = set(re.findall(r'role="img" aria-label="([^"]+)"', text))
  expected = {
    'train_loss_by_tokens',
    'validation_loss_by_flops',
    'mean_depth',
    'depth_by_position',
    'goodput',
  }
  assert expected <= names
  pictures = {path.stem for path in (folder / 'page_plots').glob('*.png')}
  assert names == pictures


def test_ids_are_unique(page):
  found = re.findall(r' id="([^"]+)"', page[0])
  assert len(found) == len(set(found))


def test_overview_states_the_result(page, finished_run):
  folder = finished_run[1]
  summary = json.loads((folder / 'summary.json').read_text())
  assert f'<td>{summary["validation/nll"]:.4f}</td>' in page[0]
  assert f'<td>{summary["validation/bits_per_byte"]:.4f}</td>' in page[0]


def test_every_token_of_the_text_tells_what_is_known_of_it(page, finished_run):
  """Depth, what each recursion said where it was predicted, and the router's logits beside their thresholds."""
  config, folder = finished_run
  spans = re.findall(r'<span class="d(\d)" tabindex="-?\d">(?:[^<]*)<i>([^<]*)</i></span>', page[0])
  assert len(spans) >= config.data.seq_len
  for depth, card in spans:
    assert re.search(rf': {depth} recursions?$', card.splitlines()[0])
    thought = re.findall(r'(-?[\d.]+) \(threshold (-?[\d.]+)\)', card.splitlines()[-1])
    assert len(thought) == config.model.num_recursions
    if depth == '2':
      assert float(thought[1][0]) >= float(thought[1][1])
  said = [card for _, card in spans if 'after recursion' in card]
  assert len(said) > len(spans) / 2
  loaded = load_run(str(folder))
  dataset = loader.open_dataset(loaded.config.data, report=lambda _: None)
  batch = next(iter(loader.validation_batches(dataset, 1, 1)))
  row = {name: batch[name] for name in ('segment_ids', 'positions')}
  routed = loaded.model.apply(loaded.variables, batch['tokens'], routing='threshold', **row)
  last = np.asarray(jax.nn.softmax(routed.logits[0]))
  same = [index for index in range(1, 60) if len(set(batch['segment_ids'][0, index - 1 : index + 1])) == 1]
  for place in same:
    (line,) = re.findall(r'after recursion 2(?: \(where it left\))?: .*', spans[place][1])
    assert int(re.findall(r'(\d+)%', line)[0]) == pytest.approx(100 * last[place - 1].max(), abs=1)


def test_axes_agree_with_what_the_run_counted(finished_run):
  _, folder = finished_run
  (run,) = runs.read([str(folder)])
  last = np.array([run.config.train.steps])
  assert run.at('tokens', last)[0] == run.summary['tokens']
  assert run.at('flops', last)[0] == pytest.approx(run.summary['train_flops'])
  assert run.at('seconds', last)[0] == pytest.approx(run.summary['seconds'])


def test_broken_last_line_is_told_and_the_rest_shown(copied_run, tmp_path):
  with (copied_run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 21, "train/lo')
  text = write(tmp_path / 'page.html', str(copied_run), tokens=0)
  assert '1 line(s) that are no records, line 21 the first' in text
  assert 'train_loss_by_tokens' in text


def test_lines_that_are_no_records_hide_no_others(copied_run, tmp_path):
  path = copied_run / 'metrics.jsonl'
  lines = path.read_text().splitlines()
  told = ['', '7', '{"train/loss": 1.0}', '[]', 'null', '{"step": 1, "train/loss": 0.0}', '{"step": "6"}']
  path.write_text('\n'.join([*lines[:5], *told, '  ', *lines[5:]]) + '\n')
  (run,) = runs.read([str(copied_run)])
  assert [record['step'] for record in run.records] == [json.loads(line)['step'] for line in lines]
  assert '6 line(s) that are no records, line 7 the first' in write(
    tmp_path / 'p.html', str(copied_run), tokens=0
  )


def test_numbers_that_are_not_finite_are_marked_and_told(copied_run, tmp_path):
  path = copied_run / 'metrics.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records[3:6]:
    record['train/loss'] = float('nan')
  records[-1]['train/grad_norm'] = float('inf')
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  (run,) = runs.read([str(copied_run)])
  steps = [record['step'] for record in records]
  curve = run.curve('train/loss')
  assert curve.lost.tolist() == steps[3:6]
  assert curve.steps.tolist() == steps[:3] + steps[6:]
  figure = plots.curves([run], lambda run: run.curve('train/loss'), 'steps', 'loss')
  crosses = [line for line in figure.axes[0].lines if line.get_marker() == 'x']
  assert crosses[0].get_xdata().tolist() == steps[3:6]
  text = write(tmp_path / 'page.html', str(copied_run), tokens=0)
  assert f'train/loss is not finite at step {steps[3]} and 2 more' in text
  assert f'train/grad_norm is not finite at step {steps[-1]} (crosses' in text


def test_a_page_that_fails_leaves_the_old_one(copied_run, tmp_path, monkeypatch):
  output = tmp_path / 'new' / 'page.html'
  monkeypatch.setattr(sections, 'overview', lambda shown: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write(output, str(copied_run), tokens=0)
  assert not output.exists()


def test_a_page_is_written_in_any_locale_and_to_readers_that_leave(copied_run, tmp_path):
  config = json.loads((copied_run / 'config.json').read_text())
  config['name'] = 'größe'
  (copied_run / 'config.json').write_text(json.dumps(config))
  folder = copied_run.rename(tmp_path / 'größe')
  command = [sys.executable, '-m', 'mor_jax.report', str(folder), '--tokens=0']
  environment = os.environ | {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  left = subprocess.run(
    ['bash', '-c', f'set -o pipefail; {shlex.join(command)} | true'],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'Traceback' not in left.stderr, left.stderr
  assert 'größe' in (folder / 'report.html').read_text(encoding='utf-8')


def test_a_single_run_shows_settings_yardsticks_and_its_text(page, finished_run):
  summary = json.loads((finished_run[1] / 'summary.json').read_text())
  for name in ('unigram_entropy', 'bigram_entropy'):
    assert f'<td>{summary[f"validation/{name}"]:.4f}</td>' in page[0]
  assert '<td>train.learning_rate</td>' in page[0]
  assert (
    html.escape(summary['sample'][:20]) in page[0]
    if summary['sample']
    else 'A text of its own' not in page[0]
  )


def test_one_validation_is_a_number_and_no_plot(copied_run, tmp_path):
  path = copied_run / 'metrics.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records[:-1]:
    record.pop('validation/nll', None)
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  text = write(tmp_path / 'page.html', str(copied_run), tokens=0)
  assert f'<td>{records[-1]["validation/nll"]:.4f}</td><td>20</td>' in text
  assert 'validation_loss_by_tokens' not in text


@pytest.mark.parametrize(
  ('content', 'function', 'verdict'),
  [
    ([2.0] * 50 + [3.0] * 50, [1.0, 1.2] * 50, 'as the paper has it'),
    ([1.0, 1.2] * 50, [2.0] * 50 + [3.0] * 50, 'not as the paper has it'),
    ([1.0, 3.0], [1.0, 2.0, 3.0], 'a difference that chance may make'),
    ([3.0], [1.0, 1.1], 'a difference that chance may make'),
  ],
)
def test_differences_between_kinds_of_words_come_with_their_uncertainty(content, function, verdict):
  words = [Word('harbour', value, 'content word') for value in content]
  words += [Word('the', value, 'function word') for value in function]
  said = sections._content_against_function(
    types.SimpleNamespace(label='run'), types.SimpleNamespace(words=words)
  )
  assert f': {verdict}, which says' in said


def test_run_without_checkpoint_still_has_its_curves(copied_run, tmp_path):
  shutil.rmtree(copied_run / 'checkpoints')
  text = write(tmp_path / 'page.html', str(copied_run))
  assert 'has no checkpoint' in text
  assert 'train_loss_by_tokens' in text


def test_unfinished_run_is_said_to_be(copied_run, tmp_path):
  (copied_run / 'summary.json').unlink()
  assert 'not finished: step 20 of 20' in write(tmp_path / 'page.html', str(copied_run), tokens=0)


def test_other_tokenizers_are_compared_in_bits_per_byte(finished_run, copied_run, tmp_path):
  data = json.loads((copied_run / 'data.json').read_text())
  data['tokenizer_digest'] = 'another'
  data['splits']['validation']['tokens'] *= 2
  (copied_run / 'data.json').write_text(json.dumps(data))
  text = write(tmp_path / 'page.html', str(finished_run[1]), str(copied_run), tokens=0)
  assert 'different tokenizers' in text
  assert 'nats per token' not in text
  first, second = runs.read([str(finished_run[1]), str(copied_run)])
  curve = first.curve('validation/nll')
  np.testing.assert_allclose(
    2 * first.bits_per_byte(curve, 'validation').values, second.bits_per_byte(curve, 'validation').values
  )
  counts = first.data['splits']['validation']
  assert first.bits_per_byte(curve, 'validation').values[-1] == nll.bits_per_byte(
    curve.values[-1], counts['tokens'], counts['bytes']
  )


def test_settings_that_differ_are_listed_with_both_values(finished_run, copied_run, tmp_path):
  config = json.loads((copied_run / 'config.json').read_text())
  config['train']['learning_rate'] = 0.25
  (copied_run / 'config.json').write_text(json.dumps(config))
  shown = runs.read([str(finished_run[1]), str(copied_run)])
  before = str(finished_run[0].train.learning_rate)
  assert runs.differing_settings(shown) == [('train.learning_rate', [before, '0.25'])]
  assert [run.label for run in shown] == ['finished', 'copied']


def test_memory_of_the_compiled_step_is_shown(page, finished_run):
  (run,) = runs.read([str(finished_run[1])])
  assert run.device_bytes > 12 * run.summary['parameters']
  assert f'<td>{run.device_bytes / 1e6:,.1f} MB</td>' in page[0]


def test_wall_time_of_an_unfinished_run_is_shown(copied_run, tmp_path):
  (copied_run / 'summary.json').unlink()
  (run,) = runs.read([str(copied_run)])
  assert sections._ledger(run)['steps'] > 0
  assert 'aria-label="goodput"' in write(tmp_path / 'page.html', str(copied_run), tokens=0)


@pytest.mark.slow
def test_gap_of_an_evaluation_is_shown_and_a_broken_one_told(copied_run, tmp_path):
  modes = {'topk': {'nll': 2.0, 'bits_per_byte': 3.0}, 'threshold': {'nll': 2.25, 'bits_per_byte': 3.5}}
  (copied_run / 'evaluation.json').write_text(json.dumps({'step': 20, 'routing': modes}))
  text = write(tmp_path / 'page.html', str(copied_run), tokens=0)
  assert '<td>2.0000</td><td>2.2500</td><td>+0.2500</td>' in text
  (copied_run / 'evaluation.json').write_text('{')
  assert 'evaluation.json cannot be read' in write(tmp_path / 'page.html', str(copied_run), tokens=0)


def test_recursions_one_by_one_are_drawn(copied_run, tmp_path):
  levels = [
    {'difficulty': k, 'accuracy': 1 - k / 10, 'mean_depth': k, 'nll': 0.1, 'predicted_tokens': 5}
    for k in (1, 2)
  ]
  mode = {'nll': 1.0, 'bits_per_byte': 1.0, 'by_difficulty': levels, 'rank_correlation': 0.9}
  bins = {'recursion': 2, 'from': 0.5, 'to': 0.6, 'tokens': 9, 'better': 0.7, 'gain': 0.1}
  readouts = [
    {
      'control': control,
      'k': k,
      'nll': 2.0,
      'nll_other_rows': 2.0,
      'temperature': 1.0,
      'nll_at_temperature': 1.9,
    }
    for control, k in (('prefix', 1), ('prefix', 2), ('repeat', 1), ('suffix', 1))
  ]
  exits = {
    'readouts': readouts,
    'calibration': [bins],
    'explained': [{'recursion': 1, 'token': 0.987, 'position': None}],
  }
  result = {'step': 20, 'routing': {'topk': mode, 'threshold': mode}, 'exits': exits}
  (copied_run / 'evaluation.json').write_text(json.dumps(result))
  text = write(tmp_path / 'page.html', str(copied_run), tokens=0)
  for shown in (
    'What recursions are worth',
    'Readouts after each recursion',
    'What routers thought',
    '98.7%',
  ):
    assert shown in text
  for name in ('by_difficulty', 'readouts_0', 'calibration_0'):
    assert (tmp_path / 'page_plots' / f'{name}.png').exists()


def test_page_that_cannot_be_written_is_refused(copied_run, tmp_path):
  with pytest.raises(ConfigError, match=r'--output=.* is a folder'):
    write(tmp_path, str(copied_run), tokens=0)


def test_page_of_a_long_run_is_below_5_MB(copied_run, tmp_path):
  lines = (copied_run / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  rng = np.random.default_rng(0)
  long = [
    {name: value + rng.normal() * 0.01 for name, value in records[step % len(records)].items()}
    | {'step': step + 1}
    for step in range(10_000)
  ]
  (copied_run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, long)) + '\n')
  assert len(write(tmp_path / 'page.html', str(copied_run))) < 5e6


def test_colours_tell_many_runs_apart():
  for count in (1, 8, 9, 45):
    assert len({plots.colour_of(index, count) for index in range(count)}) == count


def test_long_runs_make_small_pages():
  steps = np.arange(1, 10_001)
  curve = runs.Curve(steps, 3 + 1 / steps)

  class LongRun:
    label = 'long'

    def at(self, axis, steps):
      return steps

  figure = plots.curves([LongRun()], lambda _: curve, 'steps', 'loss', smooth=True)
  assert len(plots.to_svg(figure, 'loss')) < 60_000


@pytest.mark.parametrize('contents', [None, ''])
def test_run_without_metrics_is_refused(copied_run, contents):
  (copied_run / 'metrics.jsonl').unlink()
  if contents is not None:
    (copied_run / 'metrics.jsonl').write_text(contents)
  with pytest.raises(ConfigError, match='has no metrics yet'):
    runs.read([str(copied_run)])


def test_command_without_a_run_says_what_to_do():
  with pytest.raises(ConfigError, match='name the folder of at least one run'):
    entry_points.load('mor_jax.report').main([])
