"""What is read from HLO: loops whose trips stand in the condition, memory traffic, groups of collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.planning import collectives, hlo, roofline, traffic
from mor_jax.planning.chips import Chip

# As the TPU compiler writes it: no annotation of trips, layouts with tiles, S(1) for on-chip memory.
PROGRAM = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,128], f32[5,8,128])) -> (s32[], f32[8,128], f32[5,8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/f32[5,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all = f32[5,8,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %one = f32[8,128]{1,0:T(8,128)S(1)} fusion(%all, %i), kind=kLoop, calls=%pick
  %y = f32[8,128]{1,0:T(8,128)} add(%x, %one)
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) tuple(%i, %r, %all)
}

%pick (q: f32[5,8,128], j: s32[]) -> f32[8,128] {
  %q = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %j = s32[]{:T(128)} parameter(1)
  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%q, %j), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0:T(8,128)S(1)} bitcast(%s)
}

%cond (c: (s32[], f32[8,128], f32[5,8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (a: f32[8,128], b: f32[5,8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b.1 = f32[5,8,128]{2,1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%zero)
  %init = (s32[], f32[8,128]{1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) tuple(%begin, %a, %b.1)
  %w = (s32[], f32[8,128]{1,0:T(8,128)}, f32[5,8,128]{2,1,0:T(8,128)}) while(%init), condition=%cond, body=%body
  ROOT %o = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
TILE = 8 * 128 * 4


def test_trips_are_read_from_the_condition():
  """From the constant that the loop starts with up to the limit."""
  program = hlo.parse(PROGRAM)
  times = {instruction.name: times for _, instruction, times in program.executions()}
  assert times['r'] == 4
  assert times['w'] == 1
  assert 's' not in times  # fused
  fused = {instruction.name: times for _, instruction, times in program.executions(into_fusions=True)}
  assert fused['s'] == 4


def test_traffic_takes_slices_for_slices_and_on_chip_memory_for_free():
  counters = 4 * 2 + 4 * 4 + 4 * 9  # the copy of the counter, it as operand of the fusion, the condition
  in_loop = TILE + 2 * TILE + 2 * TILE  # slice read; add reads x, writes y; the all-reduce
  assert traffic.memory_traffic(hlo.parse(PROGRAM)) == 4 * in_loop + counters


def test_groups_and_their_way():
  (found,) = collectives.collectives(hlo.parse(PROGRAM))
  assert (found.kind, found.bytes, found.times) == ('all-reduce', TILE, 4)
  assert found.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
  chip = Chip('fast', flops=1e3, hbm=1, hbm_bandwidth=1e2, interconnect=10, network=1)
  near = roofline.estimate(chip, 100, 200, [found], np.zeros(8, int))
  assert (near.compute, near.memory, near.network) == (0.1, 2, 0)
  assert near.interconnect == pytest.approx(4 * 2 * TILE / 2 / 10)
  far = roofline.estimate(chip, 100, 200, [found], np.arange(8) // 4)
  assert (far.interconnect, far.network) == (0, pytest.approx(4 * 2 * TILE / 2))
  assert (far.bound, far.seconds) == ('network', far.network)


def test_traffic_agrees_with_the_compiler():
  """XLA's own bytes, on a program without loops, which it counts as we do."""

  def f(a, b):
    return jnp.tanh(a @ b).sum(axis=0), jax.lax.dynamic_slice(b, (a[0, 0].astype(int), 0), (8, 64)) * 2

  compiled = jax.jit(f).lower(jnp.zeros((128, 256)), jnp.zeros((256, 64))).compile()
  own = traffic.memory_traffic(hlo.parse(compiled.as_text()))
  assert own == pytest.approx(compiled.cost_analysis()['bytes accessed'], rel=0.05)


def test_branches_count_as_often_as_they_are_taken():
  def pick(index, x):
    return jax.lax.switch(index, [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x], x)

  compiled = jax.jit(pick).lower(0, jnp.ones((64, 64))).compile()
  program = hlo.parse(compiled.as_text())

  def products(taken):
    counted = program.executions(into_fusions=True, taken=taken)
    return sum(times for _, one, times in counted if one.opcode in ('dot', 'custom-call'))

  assert products(None) == products(lambda _: None) == 3
  assert products(lambda _: (0.5, 0.25, 0.25)) == 1
