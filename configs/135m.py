"""The paper's smallest models, 135M: 30 layers of width 576 (32 with three recursions).

  python -m mor_jax.train --config=configs/135m.py                                     mor, R=3
  python -m mor_jax.train --config=configs/135m.py --config.model.num_recursions=2     mor, R=2
  python -m mor_jax.train --config=configs/135m.py:recursive                           or :vanilla
  python -m mor_jax.train --config=configs/135m.py --config.train.flops_budget=5e18    another budget
  python -m mor_jax.train --config=configs/135m.py --config.train.flops_budget=none --config.train.steps=100

Parameters outside the 28 M of the embedding, budget in forward FLOPs as the paper counts them, steps of
1024 x 2048 tokens, and the paper's validation loss in nats per token, which is on FineWeb-Edu with the
tokenizer of SmolLM (another corpus has another loss):

                       params     budget    steps    tokens      loss
  mor R=3                42 M    16.5e18   36,325   76.18 B    2.9490
  recursive R=3          42 M    16.5e18   23,820   49.95 B    2.9552
  vanilla               106 M    16.5e18   25,408   53.28 B    2.8432
  mor R=3                42 M       5e18   11,008   23.09 B    3.0192
  recursive R=3          42 M       5e18    7,218   15.14 B    3.0534
  vanilla               106 M       5e18    7,699   16.15 B    2.9464
  mor R=3                42 M       2e18    4,403    9.23 B    3.1077
  recursive R=3          42 M       2e18    2,887    6.05 B    3.2058
  vanilla               106 M       2e18    3,080    6.46 B    3.0922

No loss is published for other numbers of recursions.

Memory of a device, estimated (mor_jax/planning/memory.py), with as many rows at once, that is
global_batch / accumulation / devices (64 on one device, with 16 micro-batches):

                           mor R=3  recursive R=3   vanilla
  v5e (16 GB)   64 rows     9.0 GB         10.5 GB   11.4 GB
  H100 (80 GB)  64 rows     9.0 GB         10.5 GB   11.4 GB
  v5p (95 GB)   64 rows     9.0 GB         10.5 GB   11.4 GB

The paper's corpus is FineWeb-Edu with the tokenizer of SmolLM; the embedded one is far too small for these budgets.
With datasets and huggingface_hub installed (requirements-data.txt), prepare as much of it as the budget reads:

  python -m mor_jax.prepare --config=configs/135m.py --config.data.tokenizer=HuggingFaceTB/SmolLM-135M \\
    --config.data.source=hf:HuggingFaceFW/fineweb-edu:sample-100BT

and train with the same two settings.
"""

from mor_jax.recipes import paper


def get_config(variant: str = 'mor'):
  """`configs/135m.py`, or its baselines `configs/135m.py:recursive` and `configs/135m.py:vanilla`."""
  config = paper.training_run(
    '135m', variant, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, mlp_dim=1536
  )
  config.train.learning_rate = 3e-3  # unpublished; that of 360M
  return config
