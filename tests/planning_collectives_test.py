from mor_jax.planning.collectives import collective_bytes

PROGRAM = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %r)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4,8], c: bf16[2]) -> f32[4,8] {
  %w = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%c), dimensions={0}
  %two = (f32[3]{0}, s8[10]{0}) all-reduce(%y, %z), to_apply=%add
  ROOT %o = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_loops_count_by_their_trips_and_starts_by_their_results():
  assert collective_bytes(PROGRAM) == {'all-reduce': 5 * 4 * 8 * 4 + 3 * 4 + 10, 'all-gather': 16 * 2}


def test_programs_without_communication():
  assert collective_bytes(PROGRAM.replace('all-', 'local-')) == {}
