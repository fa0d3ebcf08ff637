"""Token-choice routers, as in the paper's Table 14: what balances depths, squashes, shapes and weighs their scores.

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/token_choice.py

13 MoR models with three recursions, first the control whose tokens choose by noise; `chosen` is the paper's
final choice, with the z-loss back at the weight of the released runs. The paper (360M, 10 B tokens): loss 0.1, softmax, linear, no z-loss: 2.9358.
"""

from mor_jax.sweeping import axes

RECURSIONS = 3
LOSS_FREE = (
  (0.01, 'softmax', 1.0),
  (0.01, 'sigmoid', 0.1),
  (0.01, 'sigmoid', 1.0),
  (0.001, 'softmax', 1.0),
  (0.001, 'sigmoid', 0.1),
  (0.001, 'sigmoid', 1.0),
)


def get_sweep(base):
  """Overrides of the 13 runs, in the order of the table."""
  runs = [{'name': 'random', 'model.random_router': True, 'model.balancing': 'none'}]
  runs += [
    {'name': f'loss_{weight}', 'model.balancing': 'loss', 'model.balancing_loss_weight': weight}
    for weight in (0.1, 0.01)
  ]
  runs += [
    {
      'name': f'loss_free_{rate}_{squash}_{alpha}',
      'model.balancing': 'loss_free',
      'model.bias_update_rate': rate,
      'model.router_activation': squash,
      'model.router_alpha': alpha,
    }
    for rate, squash, alpha in LOSS_FREE
  ]
  runs += [
    {'name': f'loss_0.1_{head}', 'model.router_head': head, 'model.balancing_loss_weight': 0.1}
    for head in ('linear', 'wide_mlp')
  ]
  runs += [
    {'name': name, 'model.router_head': 'linear', 'model.router_z_loss_weight': weight}
    for name, weight in (('loss_0.1_linear_no_z_loss', 0.0), ('chosen', 1e-5))
  ]
  common = {
    'model.kind': 'mor',
    'model.router': 'token_choice',
    'model.sharing': 'middle_cycle',
    'model.num_recursions': RECURSIONS,
    'model.num_layers': axes.depth(base.model.num_layers, RECURSIONS, 'middle_cycle'),
    'model.capacities': None,
    'model.capacity_warmup_steps': 0,
    'model.balance_warmup_steps': 0,
    'model.selection': 'top_k',
    'model.kv': 'recursion_wise',
    'model.random_router': False,
    'model.balancing': 'loss',
    'model.balancing_loss_weight': 0.1,
    'model.router_activation': 'softmax',
    'model.router_alpha': 1.0,
    'model.router_head': 'mlp',
    'model.router_z_loss_weight': 1e-3,
  }
  return [{**common, **run} for run in runs]
