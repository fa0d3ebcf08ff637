"""The report as a browser shows it (marker browser; needs Chromium)."""

import shutil
import subprocess

import entry_points
import numpy as np
import pytest
from absl.testing import flagsaver

from mor_jax.reporting import plots

pytestmark = pytest.mark.browser
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--enable-logging=stderr')


@pytest.fixture(scope='module')
def page(finished_run, tmp_path_factory):
  report, output = entry_points.load('mor_jax.report'), tmp_path_factory.mktemp('report') / 'page.html'
  with flagsaver.flagsaver(output=str(output), tokens=64):
    report.main([str(finished_run[1])])
  return output


def chromium(*arguments: str) -> subprocess.CompletedProcess:
  """Runs the browser, which must be there."""
  program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
  assert program, 'Chromium is not installed (Debian: apt-get install chromium)'
  return subprocess.run(
    [program, *FLAGS, *arguments], capture_output=True, text=True, check=True, timeout=120
  )


def pixels(page, folder, width: int) -> np.ndarray:
  """The page as a window of this width shows it, (height, width, 3) from 0 to 255; nothing may have gone wrong."""
  import matplotlib.image

  picture = folder / f'{width}.png'
  shown = chromium(f'--screenshot={picture}', f'--window-size={width},4000', page.as_uri())
  assert 'CONSOLE' not in shown.stderr, shown.stderr
  return np.round(255 * matplotlib.image.imread(picture)[..., :3]).astype(int)


@pytest.mark.parametrize('width', [1200, 600])
def test_plots_and_text_are_seen(page, tmp_path, width):
  image = pixels(page, tmp_path, width)
  assert image.shape[1] == width
  rows_with_ink = (np.abs(image - image[-1, 0]).sum(axis=-1) > 60).any(axis=1)
  assert rows_with_ink.mean() > 0.3, 'a page of plots and tables, not a blank one'
  for name, colour in (('first run', plots.COLOURS[0]), ('axes', plots.STYLE['axes.edgecolor'])):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    seen = (np.abs(image - wanted).max(axis=-1) <= 8).sum()
    assert seen > 50, f'{name}: {seen} pixels of {colour}'


def test_every_section_is_in_the_document(page):
  document = chromium('--dump-dom', page.as_uri()).stdout
  for title in ('Overview', 'Loss', 'How deep tokens go', 'Memory and goodput'):
    assert f'<h2>{title}' in document
  assert document.count('role="img"') >= 5
