"""The documentation: links lead somewhere, the tree names the files that there are, README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
  [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('launch/*.md'),
    *ROOT.glob('benchmarks/**/*.md'),
  ]
)
README_LINES = 130
LARGEST_IMAGE = 200_000

LINK = re.compile(r'\[[^\]]*\]\((?P<target>[^)\s]+)\)|(?:src|href|srcset)="(?P<attribute>[^"]+)"')
FENCE = re.compile(r'^(```|~~~).*?^\1', re.DOTALL | re.MULTILINE)
NAMED_FILE = re.compile(
  r'(?<![\w/.-])((?:mor_jax|configs|launch|benchmarks|tests|docs)/[\w./-]+\.(?:py|md|sh|yaml|sbatch|svg|png))\b'
)


def anchors(page: Path) -> set[str]:
  """What GitHub calls the headings of a page."""
  headings = re.findall(r'^#+ +(.*)$', FENCE.sub('', page.read_text()), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(page):
  assert not re.search(r'@[A-Z]+@|TODO|<<<<<<<|>>>>>>>', FENCE.sub('', page.read_text()))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
  for match in LINK.finditer(FENCE.sub('', page.read_text())):
    target = match['target'] or match['attribute']
    if re.match(r'[a-z]+:', target):
      continue
    path, _, anchor = target.partition('#')
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f'{target} is not there'
    assert not anchor or anchor in anchors(file), f'{target}: no such heading'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
  """Files that the prose names by their path; NAME stands for any, and diffs may add some."""
  named = NAMED_FILE.findall(FENCE.sub('', page.read_text()))
  missing = [name for name in named if 'NAME' not in name and not (ROOT / name).exists()]
  assert not missing


def test_the_tree_names_every_module():
  """docs/architecture.md has one line for each file of mor_jax; only empty __init__.py files are left out."""
  there = {
    str(path.relative_to(ROOT))
    for path in (ROOT / 'mor_jax').rglob('*.py')
    if path.name != '__init__.py' or path.read_text().strip()
  }
  assert set(tree(ROOT / 'docs' / 'architecture.md')) ^ there == set()


def tree(page: Path) -> list[str]:
  """Paths of the files in the first fenced block that begins with mor_jax/."""
  (block,) = re.findall(r'^```\n(mor_jax/\n.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
  folders, files = [], []
  for line in block.splitlines():
    name = line.split()[0]
    depth = (len(line) - len(line.lstrip())) // 2
    folders[depth:] = [name.rstrip('/')]
    if not name.endswith('/'):
      files.append('/'.join(folders))
  assert len(files) == len(set(files))
  return files


def test_every_page_is_in_the_index():
  linked = {match['target'] for match in LINK.finditer((ROOT / 'docs' / 'index.md').read_text())}
  pages = {page.name for page in (ROOT / 'docs').glob('*.md')} - {'index.md'}
  assert pages <= linked


def test_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= README_LINES


def test_images_are_small():
  assert all(image.stat().st_size < LARGEST_IMAGE for image in (ROOT / 'docs').rglob('*.png'))
