"""Equal FLOPs over sizes and budgets, as in the paper's Table 9, at the scale of --config.

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/isoflop.py

Vanilla, recursive and MoR models with three recursions, of a half, three quarters and all of the width of
--config, trained for three budgets that are to each other as the paper's (2 : 5 : 16.5). The largest is what
the run of --config itself takes; warm-up is 5% of the steps of the smallest budget, as in the paper.
"""

import dataclasses

from mor_jax.model import flops
from mor_jax.sweeping import axes
from mor_jax.training import budget

RECURSIONS = 3
WIDTHS = (0.5, 0.75, 1.0)
BUDGETS = (2 / 16.5, 5 / 16.5, 1.0)
WARMUP = 0.05


def get_sweep(base):
  """Overrides of the 27 runs."""
  base = budget.with_budgeted_steps(base)
  tokens = base.train.steps * base.train.global_batch * base.data.seq_len
  largest = tokens * flops.paper_flops_per_token(base.model, base.data.seq_len)
  budgets = [float(f'{largest * part:.3g}') for part in BUDGETS]
  return [
    _run(base, kind, width, spent, budgets[0])
    for width in WIDTHS
    for kind in ('vanilla', 'recursive', 'mor')
    for spent in budgets
  ]


def _run(base, kind, width, spent, smallest):
  heads = max(1, round(base.model.num_heads * width))
  kv_heads = max(k for k in range(1, heads + 1) if heads % k == 0 and k <= base.model.num_kv_heads)
  model = {
    'kind': kind,
    'num_layers': axes.depth(base.model.num_layers, RECURSIONS, 'middle_cycle'),
    'num_recursions': RECURSIONS,
    'sharing': 'middle_cycle',
    'kv': 'recursion_wise',
    'd_model': heads * base.model.head_width,
    'num_heads': heads,
    'num_kv_heads': kv_heads,
    'head_dim': base.model.head_width,
    'mlp_dim': max(8, round(base.model.mlp_dim * width / 8) * 8),
  }
  shape = dataclasses.replace(base.model, **model)
  per_step = (
    base.train.global_batch * base.data.seq_len * flops.paper_flops_per_token(shape, base.data.seq_len)
  )
  return {
    'name': f'{kind}_{width:g}_{spent:.3g}',
    **{f'model.{name}': value for name, value in model.items()},
    'train.flops_budget': spent,
    'train.warmup_steps': int(WARMUP * smallest / per_step),
    'train.ramp_batch': None,
    'train.ramp_steps': 0,
  }
