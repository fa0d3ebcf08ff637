"""What recursions attend to, as in the paper's Table 15: keys and values of their own, shared, or both.

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/kv.py

Vanilla models whose layers read one another's keys and values, recursive models of three sharing schemes, and
MoR with both routers, with two and three recursions. Depths that the recursions do not divide are raised. The
paper states the loss in training (360M, 10 B tokens): MoR expert-choice 2.8667, shared 2.8895, hybrid
2.8653; token-choice 2.9358, shared 2.9155; recursive Middle-Cycle, two recursions, 2.8295, shared 2.8451.
"""

from mor_jax.sweeping import axes


def get_sweep(base):
  """Overrides of the runs."""
  layers = base.model.num_layers
  depths = sorted({axes.depth(layers, recursions, 'cycle') for recursions in (2, 3)})
  runs = [
    {'name': f'vanilla_{depth}_layers', 'model.kind': 'vanilla', 'model.num_layers': depth}
    for depth in depths
  ]
  runs += [
    _run('vanilla', scheme, recursions, 'shared', layers)
    for recursions in (2, 3)
    for scheme in ('sequence', 'cycle')
  ]
  runs += [
    _run('recursive', scheme, recursions, kv, layers)
    for scheme in ('cycle', 'sequence', 'middle_cycle')
    for recursions in (2, 3)
    for kv in ('recursion_wise', 'shared')
  ]
  runs += [
    _run('mor', 'middle_cycle', 3, kv, layers) | {'name': f'mor_expert_{kv}'}
    for kv in ('recursion_wise', 'shared', 'hybrid')
  ]
  runs += [
    _run('mor', 'middle_cycle', 3, kv, layers)
    | {'name': f'mor_token_{kv}', 'model.router': 'token_choice', 'model.router_z_loss_weight': 1e-5}
    for kv in ('recursion_wise', 'shared')
  ]
  common = {'model.router': 'expert_choice', 'model.kv': 'recursion_wise'}
  return [{**common, **run} for run in runs]


def _run(kind, scheme, recursions, kv, layers):
  return {
    'name': f'{kind}_{scheme}_r{recursions}_{kv}',
    'model.kind': kind,
    'model.sharing': scheme,
    'model.num_recursions': recursions,
    'model.num_layers': axes.depth(layers, recursions, scheme),
    'model.kv': kv,
  }
