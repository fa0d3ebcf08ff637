"""Which layers share parameters, as in the paper's Table 10: four schemes, two and three recursions, and baselines.

  python -m mor_jax.sweep --config=configs/tiny.py --sweep=configs/sweeps/sharing.py

11 recursive and vanilla models without routers. `full` has the depth of --config, `reduced` ones a half
and a third of it, about as many parameters as the recursive models. Depths that the recursions do not divide
are raised. The paper (360M, 10 B tokens): full 2.8471; two recursions: Middle-Cycle 2.8295, Cycle 2.8487,
Middle-Sequence 2.9303, Sequence 2.9467; three: 2.8760, 2.9363, 2.9753, 3.0245.
"""

from mor_jax.config.model import SHARING_SCHEMES
from mor_jax.sweeping import axes


def get_sweep(base):
  """Overrides of the 11 runs."""
  layers = base.model.num_layers
  runs = [{'name': 'full', 'model.kind': 'vanilla', 'model.num_layers': layers}]
  runs += [
    {'name': f'reduced_{part}', 'model.kind': 'vanilla', 'model.num_layers': round(layers / part)}
    for part in (2, 3)
  ]
  runs += [
    {
      'name': f'{scheme}_r{recursions}',
      'model.kind': 'recursive',
      'model.sharing': scheme,
      'model.num_recursions': recursions,
      'model.num_layers': axes.depth(layers, recursions, scheme),
    }
    for recursions in (2, 3)
    for scheme in SHARING_SCHEMES
  ]
  return [{'model.kv': 'recursion_wise', **run} for run in runs]
