"""Learning rates and seeds of vanilla, recursive and MoR models: is a difference more than noise?

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/learning_rate.py

Five learning rates around that of --config, from a quarter to four times it, and three seeds, of initial
weights and of the order of the rows alike: 45 runs. The table over seeds has means and standard deviations.
"""

from mor_jax.sweeping import axes

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SEEDS = (0, 1, 2)


def get_sweep(base):
  """Overrides of the 45 runs."""
  rates = [float(f'{base.train.learning_rate * factor:.4g}') for factor in FACTORS]
  models = axes.grid({'model.kind': ('vanilla', 'recursive', 'mor'), 'train.learning_rate': rates})
  return axes.product(models, [{'train.seed': seed, 'data.seed': seed} for seed in SEEDS])
