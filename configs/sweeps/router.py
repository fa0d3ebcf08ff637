"""Expert-choice routers, as in the paper's Table 13: what teaches them, squashes, shapes and weighs their scores.

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/router.py

18 MoR models with three recursions. Two of them, whose gates nothing squashes, gave no numbers in the paper
(NaN); where they do here, the run is recorded as failed and the others go on. The paper (360M, 10 B tokens):
aux_loss 0.001, sigmoid, alpha 0.1, linear: 2.8667; a random router: 2.9335.
"""

from mor_jax.sweeping import axes

RECURSIONS = 3
SQUASHES = (('identity', 1.0), ('sigmoid', 0.1), ('sigmoid', 1.0), ('tanh', 0.1), ('tanh', 1.0))


def get_sweep(base):
  """Overrides of the 18 runs, in the order of the table."""
  runs = [{'name': 'random', 'model.random_router': True, 'model.causality': 'none'}]
  runs += [
    {**_scored(f'aux_router_{squash}_{alpha}', squash, alpha), 'model.causality': 'aux_router'}
    for squash, alpha in SQUASHES
  ]
  runs += [_with_loss(0.01, squash, alpha) for squash, alpha in SQUASHES]
  runs += [_with_loss(weight, 'sigmoid', 0.1) for weight in (0.1, 0.001)]
  runs += [_with_loss(0.001, 'tanh', 0.1)]
  best = _with_loss(0.001, 'sigmoid', 0.1)
  runs += [
    {**best, 'name': 'linear', 'model.router_head': 'linear'},
    {**best, 'name': 'wide_mlp', 'model.router_head': 'wide_mlp'},
    {
      **best,
      'name': 'linear_capacity_warmup',
      'model.router_head': 'linear',
      'model.capacity_warmup_steps': max(1, base.train.warmup_steps),
    },
    {**best, 'name': 'linear_z_loss', 'model.router_head': 'linear', 'model.router_z_loss_weight': 1e-3},
  ]
  common = {
    'model.kind': 'mor',
    'model.router': 'expert_choice',
    'model.sharing': 'middle_cycle',
    'model.num_recursions': RECURSIONS,
    'model.num_layers': axes.depth(base.model.num_layers, RECURSIONS, 'middle_cycle'),
    'model.router_head': 'mlp',
    'model.capacity_warmup_steps': 0,
    'model.router_z_loss_weight': 0.0,
    'model.random_router': False,
    'model.selection': 'top_k',
    'model.kv': 'recursion_wise',
  }
  return [{**common, **run} for run in runs]


def _scored(name, squash, alpha):
  return {'name': name, 'model.router_activation': squash, 'model.router_alpha': alpha}


def _with_loss(weight, squash, alpha):
  scored = _scored(f'aux_loss_{weight}_{squash}_{alpha}', squash, alpha)
  return {**scored, 'model.causality': 'aux_loss', 'model.aux_loss_weight': weight}
