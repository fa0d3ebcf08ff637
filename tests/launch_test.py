"""The launchers: what they would do, word for word; what they do with stand-ins for the clouds; one for real."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'fixtures' / 'launch'
SCRIPTS = ('local.sh', 'tpu_vm.sh', 'gke.sh', 'slurm.sbatch')
TRAINING = ('--config=configs/tiny.py', "--config.data.source=files:a 'b'/*.txt", '--config.train.steps=3')
TPU = ('--name=mor', '--zone=us-east5-b', '--type=v5p-128')
GKE = ('--name=mor', '--image=registry/mor:1', '--accelerator=tpu-v5p-slice', '--topology=4x4x8')
NEEDED = {'local.sh': (), 'tpu_vm.sh': TPU, 'gke.sh': GKE, 'slurm.sbatch': ()}


def launch(script, *arguments, **environment):
  """The finished process of a launcher."""
  env = {name: value for name, value in os.environ.items() if not name.startswith('SLURM')}
  env |= {'JAX_PLATFORMS': 'cpu', 'TMPDIR': '/tmp', 'MOR_JAX_WAIT_SECONDS': '0.05'} | environment
  command = ['bash', str(ROOT / 'launch' / script), *arguments]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
  ('golden', 'script', 'arguments'),
  [
    ('local', 'local.sh', ('--port=12345',)),
    ('local_alone', 'local.sh', ('--processes=1',)),
    ('tpu_vm', 'tpu_vm.sh', TPU),
    ('tpu_vm_queued', 'tpu_vm.sh', (*TPU, '--queued', '--spot', '--project=p', '--delete')),
    ('gke', 'gke.sh', (*GKE, '--slices=2', '--namespace=n')),
    ('slurm', 'slurm.sbatch', ()),
  ],
)
def test_dry_run_prints_all_that_would_be_done(golden, script, arguments):
  done = launch(script, '--dry_run', *arguments, *TRAINING, PATH='/usr/bin:/bin')
  assert done.returncode == 0, done.stderr
  path = GOLDEN / f'{golden}.txt'
  text = done.stdout + done.stderr
  if 'MOR_JAX_WRITE_GOLDEN' in os.environ:
    path.write_text(text)
  assert text == path.read_text()


def test_local_takes_paths_from_where_it_is_called(tmp_path):
  """Settings of the repository included, and with spaces in all of them."""
  folder = tmp_path / 'my runs'
  folder.mkdir()
  words = ('--dry_run', '--processes=1', '--config=configs/tiny.py', '--workdir=a run')
  command = ['bash', str(ROOT / 'launch' / 'local.sh'), *words]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
  assert f'--config={ROOT}/configs/tiny.py' in done.stdout
  assert "'--workdir=a run'" in done.stdout
  show = 'from mor_jax import __file__ as at; import os; print(os.getcwd(), at)'
  line = done.stdout.splitlines()[0].rstrip('&').replace('-m mor_jax.train', f'-c {shlex.quote(show)}')
  where = subprocess.check_output(['bash', '-c', line], cwd=folder, text=True).strip()
  assert where == f'{folder} {ROOT}/mor_jax/__init__.py'


def test_a_dry_run_is_a_script(tmp_path):
  """What is printed is quoted so that a shell reads the words that the launcher was given."""
  (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  (tmp_path / 'srun').chmod(0o755)
  printed = launch('slurm.sbatch', '--dry_run', *TRAINING).stdout.splitlines()[0]
  words = subprocess.check_output(
    ['bash', '-c', printed], env={'PATH': f'{tmp_path}:/bin:/usr/bin'}, text=True
  )
  assert tuple(words.splitlines()[-3:]) == TRAINING


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_names_every_flag_of_the_launcher(script):
  done = launch(script, '--help')
  assert done.returncode == 0
  text = (ROOT / 'launch' / script).read_text()
  named = re.search(r"^take_flags '([^']*)' '([^']*)'", text, re.M).groups()
  known = {f'--{name}' for names in (*named, 'dry_run help') for name in names.split()}
  assert {'--dry_run', *(word.partition('=')[0] for word in NEEDED[script])} <= known
  assert all(flag in done.stdout for flag in known), known
  assert 'set -euo pipefail' not in done.stdout
  assert done.stdout.startswith('Trains ')


@pytest.mark.parametrize(
  ('script', 'arguments', 'message'),
  [
    *((script, (*NEEDED[script], 'word', *TRAINING), 'unexpected argument word') for script in SCRIPTS),
    *((script, NEEDED[script], '--config is missing') for script in SCRIPTS),
    *((s, (*NEEDED[s], '--process_id=1', *TRAINING), "--process_id=1 is the launcher's") for s in SCRIPTS),
    *((s, (*NEEDED[s], '--restarts=x', *TRAINING), '--restarts=x is not allowed') for s in SCRIPTS),
    ('local.sh', ('--processes=0', *TRAINING), '--processes=0 is not allowed: must be a whole number'),
    ('tpu_vm.sh', TRAINING, '--name is missing, for example --name=mor'),
    ('tpu_vm.sh', ('--name=Mor', *TPU[1:], *TRAINING), '--name=Mor is not allowed: must be lower-case'),
    ('tpu_vm.sh', (*TPU, *TRAINING), 'gcloud is not installed'),
    ('gke.sh', (*GKE[:3], '--topology=4', *TRAINING), '--topology=4 is not allowed'),
    ('gke.sh', (*GKE, '--chips_per_host=3', *TRAINING), '--chips_per_host=3 does not divide the 128 chips'),
    ('gke.sh', (*GKE, *TRAINING), 'kubectl is not installed'),
    ('slurm.sbatch', TRAINING, 'this is not a SLURM job: submit it with sbatch'),
  ],
)
def test_what_cannot_work_is_refused_with_one_sentence(script, arguments, message, tmp_path):
  for tool in ('bash', 'dirname', 'sed'):  # a machine without the tools of any cloud
    (tmp_path / tool).symlink_to(shutil.which(tool))
  done = launch(script, *arguments, PATH=str(tmp_path))
  assert (done.returncode, done.stdout) == (2, '')
  assert re.fullmatch(rf'error: .*{re.escape(message)}.*\n|error: {re.escape(message)}.*\n', done.stderr)


def test_shellcheck():
  shellcheck = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  assert shellcheck, 'pip install -r requirements-dev.txt'
  scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / 'launch').glob('*.s*'))]
  assert len(scripts) == 5
  done = subprocess.run([shellcheck, '-x', *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_the_manifest_is_yaml_with_the_words_of_the_command():
  yaml = pytest.importorskip('yaml')
  text = launch('gke.sh', '--dry_run', *GKE, '--slices=2', *TRAINING).stdout
  manifest = yaml.safe_load(re.search(r"<<'EOF'\n(.*)^EOF$", text, re.M | re.S)[1])
  job = manifest['spec']['replicatedJobs'][0]
  assert (job['replicas'], job['template']['spec']['parallelism']) == (2, 32)
  container = job['template']['spec']['template']['spec']['containers'][0]
  assert container['command'] == ['python', '-m', 'mor_jax.train', *TRAINING, '--cluster']
  assert container['resources']['limits'] == {'google.com/tpu': 4}


# ---- stand-ins: programs that answer from a list and note how they were called ----


@pytest.fixture
def stand_in(tmp_path):
  """Makes a program of a name from lines of shell; `calls()` is what all of them were called with."""
  notes = tmp_path / 'calls'
  notes.touch()

  def make(name, body):
    path = tmp_path / name
    # `turn WORD` counts the calls for a word, from 1.
    path.write_text(
      f'#!/bin/bash\necho "{name} $*" >>{notes}\n'
      f'turn() {{ echo >>{tmp_path}/turn.$1; turn=$(wc -l <{tmp_path}/turn.$1); }}\n{body}\n'
    )
    path.chmod(0o755)

  make.calls = lambda: notes.read_text().splitlines()
  make.path = f'{tmp_path}:/usr/bin:/bin'
  return make


@pytest.mark.parametrize(
  ('codes', 'attempts', 'code'),
  [
    ((0,), 1, 0),
    ((2,), 1, 2),
    ((130,), 1, 130),
    ((70, 143, 143, 143, 143, 0), 6, 0),
    ((1, 0), 2, 0),
    ((134, 1, 1, 0), 3, 1),
    ((1, 1, 143, 1, 1, 0), 6, 0),
  ],
)
def test_local_starts_again_what_did_not_end_for_good(stand_in, codes, attempts, code):
  words = ' '.join(map(str, codes))
  stand_in('python', f'codes=({words}); turn start; exit "${{codes[turn - 1]}}"')
  done = launch('local.sh', '--processes=1', '--port=1', '--restarts=2', *TRAINING, PATH=stand_in.path)
  assert (len(stand_in.calls()), done.returncode) == (attempts, code), done.stderr


@pytest.mark.parametrize(
  ('codes', 'code'), [((-9, 1), 1), ((1, 2), 2), ((143, 134), 143), ((70, 134), 70), ((0, 0), 0)]
)
def test_local_judges_by_the_process_that_was_first(stand_in, codes, code):
  """A lost peer is not the cause: 137 is higher than the 1 of those that were left."""
  lines = [f'*process_id={i}*) {"kill -9 $$" if c == -9 else f"exit {c}"} ;;' for i, c in enumerate(codes)]
  stand_in('python', f'case "$*" in {" ".join(lines)} esac')
  done = (
    launch('local.sh', '--port=1', '--restarts=0', *TRAINING, PATH=stand_in.path)
    if code in (0, 1, 2)
    else None
  )
  if done is None:  # started for ever: the second time it is over
    stand_in('python', f'turn start; ((turn <= 2)) || exit 0; case "$*" in {" ".join(lines)} esac')
    done = launch('local.sh', '--port=1', '--restarts=0', *TRAINING, PATH=stand_in.path)
    assert f'ended with code {code};' in done.stderr
    code = 0
  assert done.returncode == (137 if codes[0] == -9 else code), done.stderr


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_on_and_waits(stand_in, tmp_path, number, code):
  stand_in(
    'python',
    f'trap "sleep 0.3; echo >>{tmp_path}/saved; exit 143" TERM; for i in {{1..200}}; do sleep 0.05; done',
  )
  command = ['bash', str(ROOT / 'launch' / 'local.sh'), '--port=1', *TRAINING]
  process = subprocess.Popen(command, env=os.environ | {'PATH': stand_in.path}, stderr=subprocess.PIPE)
  while len(stand_in.calls()) < 2:
    time.sleep(0.02)
  time.sleep(0.2)
  process.send_signal(number)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == code, errors
  assert (tmp_path / 'saved').read_text() == '\n\n', 'both'
  assert len(stand_in.calls()) == 2, 'not started again'


GCLOUD = """
case "$*" in
  *queued-resources*describe*) exit 1 ;;
  *describe*) turn state; states=({states}); state=${{states[turn - 1]}}; [ "$state" != none ] || exit 1; echo "$state" ;;
  *pgrep*) exit 1 ;;
  *--worker=all*"cat mor_jax/exit_code"*) turn code; codes=({codes}); echo "${{codes[turn - 1]}}"; echo 0 ;;
esac
"""


@pytest.mark.parametrize(
  ('states', 'codes', 'code', 'created', 'removed', 'started'),
  [
    ('none CREATING READY READY', '0', 0, 1, 0, 1),
    ('READY READY', '2', 2, 0, 0, 1),
    ('READY READY READY READY', '143 0', 0, 0, 0, 2),
    ('READY PREEMPTED PREEMPTED none READY READY', '0', 0, 1, 1, 2),
    ('READY READY READY READY', '1 1', 1, 0, 0, 2),
  ],
)
def test_tpu_vm_creates_reuses_and_retries(stand_in, states, codes, code, created, removed, started):
  stand_in('gcloud', GCLOUD.format(states=states, codes=codes))
  done = launch('tpu_vm.sh', *TPU, '--restarts=1', *TRAINING, PATH=stand_in.path)
  assert done.returncode == code, done.stderr
  calls = '\n'.join(stand_in.calls())
  assert calls.count('tpu-vm create') == created
  assert calls.count('tpu-vm delete') == removed
  assert calls.count('setsid') == started
  assert calls.count('scp') == started


@pytest.mark.parametrize(('states', 'code'), [("'' '' Completed", 0), ("'' Failed", 1)])
def test_gke_applies_and_follows_to_the_end(stand_in, tmp_path, states, code):
  body = f'case "$*" in *apply*) cat >{tmp_path}/applied ;; *get*) turn get; s=({states}); echo "${{s[turn - 1]}}" ;; esac'
  stand_in('kubectl', body)
  done = launch('gke.sh', *GKE, *TRAINING, PATH=stand_in.path)
  assert done.returncode == code, done.stderr
  assert 'kind: JobSet' in (tmp_path / 'applied').read_text()
  assert '@' not in re.sub(r'#.*', '', (tmp_path / 'applied').read_text())
  assert any('logs --follow' in call for call in stand_in.calls())


@pytest.mark.parametrize(
  ('codes', 'requeued', 'code'), [((0,), 0, 0), ((2,), 0, 2), ((143, 70, 143), 3, 0), ((1, 134, 1), 2, 1)]
)
def test_slurm_goes_into_the_queue_again(stand_in, tmp_path, codes, requeued, code):
  (tmp_path / 'launch').symlink_to(ROOT / 'launch')
  stand_in('srun', f'turn run; codes=({" ".join(map(str, codes))}); exit "${{codes[turn - 1]}}"')
  stand_in('scontrol', '')
  job = {'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(tmp_path), 'PATH': stand_in.path}
  for _ in codes:
    done = launch('slurm.sbatch', '--restarts=2', *TRAINING, **job)
  assert done.returncode == code, done.stderr
  assert sum(call == 'scontrol requeue 7' for call in stand_in.calls()) == requeued


@pytest.mark.slow
def test_local_trains_with_two_processes_for_real(tmp_path):
  settings = {
    'data.max_documents': 40, 'data.cache_dir': tmp_path / 'cache', 'data.seq_len': 64, 'model.num_layers': 4,
    'model.num_recursions': 2, 'model.d_model': 32, 'model.num_heads': 2, 'model.num_kv_heads': 1, 'model.mlp_dim': 64,
    'train.steps': 6, 'train.warmup_steps': 1, 'train.global_batch': 4, 'train.eval_rows': 4, 'train.sample_tokens': 0,
    'train.log_every': 1, 'checkpoint.every_steps': 3,
  }  # fmt: skip
  words = [f'--config.{name}={value}' for name, value in settings.items()]
  run = ('--processes=2', '--config=configs/tiny.py', f'--workdir={tmp_path / "run"}', *words)
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = launch('local.sh', *run, PATH=path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('Finished') == 1
  assert '2 x cpu' in done.stdout
  assert (tmp_path / 'run' / 'checkpoints' / '6' / 'process_1.json').exists()
  refused = launch('local.sh', *run, '--config.model.kind=none', PATH=path)
  assert refused.returncode == 2
  assert "model.kind='none' is not one of" in refused.stderr
