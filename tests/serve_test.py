"""python -m mor_jax.serve: from the ready line to SIGTERM, and what it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest


def command(*flags: str, **options) -> subprocess.Popen:
  program = [sys.executable, '-m', 'mor_jax.serve', *flags]
  return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_serves_until_it_is_told_to_end(finished_run):
  """SIGTERM while a text is being streamed: it ends, nothing new is taken, exit code 0."""
  flags = f'--checkpoint={finished_run[1]}', '--port=0', '--slots=2', '--name=small', '--ticks_per_call=1'
  process = command(*flags, env=os.environ | {'MOR_JAX_API_KEY': 'secret'})
  lines = iter(process.stdout.readline, '')
  assert re.fullmatch(r'listening at http://127.0.0.1:\d+; compiling\n', next(lines))
  address = re.search(r'small at (http://[\d.:]+)/v1, 2 slots of 64 tokens', next(lines))[1]
  headers = {'Authorization': 'Bearer secret'}
  body = {'model': 'small', 'prompt': 'The ', 'max_tokens': 55, 'ignore_eos': True, 'stream': True}
  with httpx.stream('POST', f'{address}/v1/completions', json=body, headers=headers, timeout=60) as answer:
    received = answer.iter_lines()
    assert json.loads(next(received).removeprefix('data: '))['choices']
    process.send_signal(signal.SIGTERM)
    assert 'draining: 1 requests may end within 30 s' in next(lines)
    assert httpx.get(f'{address}/health').status_code == 503
    *_, last, _ = received
  assert last == 'data: [DONE]'
  assert process.wait(timeout=60) == 0
  assert list(lines) == ['stopped\n']
  assert 'Traceback' not in process.stderr.read()


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(finished_run):
  flags = f'--checkpoint={finished_run[1]}', '--port=0', '--slots=2', '--name=small', '--ticks_per_call=1'
  process = command(*flags)
  lines = iter(process.stdout.readline, '')
  next(lines)
  address = re.search(r'(http://[\d.:]+)/v1', next(lines))[1]
  body = {'model': 'small', 'prompt': 'The ', 'max_tokens': 55, 'ignore_eos': True, 'stream': True, 'n': 128}
  with httpx.stream('POST', f'{address}/v1/completions', json=body, timeout=60) as answer:
    next(answer.iter_lines())
    process.send_signal(signal.SIGTERM)
    next(lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


@pytest.mark.slow
def test_a_signal_while_it_compiles_ends_it(finished_run):
  process = command(f'--checkpoint={finished_run[1]}', '--port=0')
  address = re.search(r'http://[\d.:]+', process.stdout.readline())[0]
  assert httpx.get(f'{address}/health', timeout=60).json()['status'] == 'compiling'
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0
  assert 'draining' in output
  assert 'ready' not in output
  assert 'Traceback' not in errors


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), '--checkpoint is missing'),
    (('--checkpoint=RUN', '--slots=0'), '--slots=0 is not allowed: must be >= 1'),
    (('--checkpoint=RUN', '--port=TAKEN'), 'cannot be used'),
  ],
)
def test_refuses(finished_run, flags, message):
  with socket.create_server(('127.0.0.1', 0)) as listener:
    values = {'RUN': str(finished_run[1]), 'TAKEN': str(listener.getsockname()[1])}
    given = [flag.partition('=') for flag in flags]
    process = command(*(f'{name}={values.get(value, value)}' for name, _, value in given))
    _, errors = process.communicate(timeout=120)
  assert process.returncode == 2, errors
  assert message in errors
  assert 'Traceback' not in errors
