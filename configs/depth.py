"""Does a router send hard tokens deeper? A task whose depth is known, four minutes on two CPU cores.

  python -m mor_jax.train --config=configs/depth.py
  python -m mor_jax.evaluate --checkpoint=runs/depth-benefit --exits
  python -m mor_jax.report runs/depth-benefit

Pointer chasing (mor_jax/data/synthetic.py): twelve facts 'n3>n5', then questions such as '3:n4', which node is three steps
from n4? One layer is applied up to four times, and a step takes one application, so that a question needs as many
recursions as it has steps. The control of benchmarks/depth.py, where all variants are compared:

  benefit   the router learns which tokens gain by going on; the default
  gate      the router learns through the gate, as in the paper
  random    as many tokens go on, drawn by lot
  all       every token takes all four recursions
  recursive, vanilla   without a router
"""

from mor_jax import config as mor_config

VARIANTS = ('benefit', 'gate', 'random', 'all', 'recursive', 'vanilla')
NODES, HOPS, QUESTIONS = 12, 4, 16
# Questions with more than r steps, of all tokens: 12 facts, 16 questions and the end of the document.
CAPACITIES = (1.0, 0.414, 0.276, 0.138)


def get_config(variant: str = 'benefit'):
  """`configs/depth.py`, or one of VARIANTS as `configs/depth.py:gate`."""
  if variant not in VARIANTS:
    raise mor_config.ConfigError(
      f'configs/depth.py:{variant} does not exist; use one of {", ".join(VARIANTS)}'
    )
  config = mor_config.default()
  config.name = f'depth-{variant}'

  model = config.model
  model.kind = variant if variant in ('recursive', 'vanilla') else 'mor'
  model.num_layers = HOPS
  model.num_recursions = HOPS
  model.sharing = 'cycle'
  model.d_model = 64
  model.num_heads = 4
  model.num_kv_heads = 4
  model.mlp_dim = 192
  model.dtype = 'float32'
  model.embed_factor = NODES
  model.init = 'plain'
  model.embed_std = 1.0
  model.init_std = 0.1
  model.tie_embeddings = False
  if model.kind == 'mor':
    model.capacities = CAPACITIES
  if variant == 'benefit':
    model.router_target = 'benefit'
  if variant in ('random', 'all'):
    model.random_router = True
    model.random_gate = 1.0
    model.gating = 'residual'
    model.causality = 'none'
    model.kv = 'shared'
  if variant == 'all':
    model.capacities = (1.0,) * HOPS

  config.data.source = f'synthetic:chase,nodes={NODES},hops={HOPS},questions={QUESTIONS}'
  config.data.seq_len = NODES + QUESTIONS + 1

  config.train.steps = 2500
  config.train.global_batch = 64
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 50
  config.train.decay_fraction = 0.4
  config.train.log_every = 100
  config.train.eval_every = 500
  config.train.sample_tokens = 0
  config.checkpoint.every_steps = 1000
  return config
