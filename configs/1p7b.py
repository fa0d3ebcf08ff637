"""The paper's largest models, 1.7B: 24 layers of width 2048 (26 with three recursions).

  python -m mor_jax.train --config=configs/1p7b.py                                     mor, R=3
  python -m mor_jax.train --config=configs/1p7b.py --config.model.num_recursions=2     mor, R=2
  python -m mor_jax.train --config=configs/1p7b.py:recursive                           or :vanilla
  python -m mor_jax.train --config=configs/1p7b.py --config.train.flops_budget=5e18    another budget
  python -m mor_jax.train --config=configs/1p7b.py --config.train.flops_budget=none --config.train.steps=100

Parameters outside the 101 M of the embedding, budget in forward FLOPs as the paper counts them, steps of
1024 x 2048 tokens, and the paper's validation loss in nats per token, which is on FineWeb-Edu with the
tokenizer of SmolLM (another corpus has another loss):

                       params     budget    steps    tokens      loss
  mor R=3               671 M    16.5e18    3,101    6.50 B    2.8316
  recursive R=3         671 M    16.5e18    2,122    4.45 B    3.0042
  vanilla              1611 M    16.5e18    2,299    4.82 B    2.8658
  mor R=3               671 M       5e18      940    1.97 B    3.2905
  recursive R=3         671 M       5e18      643    1.35 B    3.8876
  vanilla              1611 M       5e18      697    1.46 B    3.6926
  mor R=3               671 M       2e18      376    0.79 B    4.1175
  recursive R=3         671 M       2e18      257    0.54 B    5.3277
  vanilla              1611 M       2e18      279    0.59 B    5.1349

The paper also trains for 68.5e18 FLOPs, without giving losses: 26 B tokens for mor R=2, 27 B for mor R=3,
20 B for vanilla.

Memory of a device, estimated (mor_jax/planning/memory.py), with as many rows at once, that is
global_batch / accumulation / devices (64 on one device, with 16 micro-batches):

                           mor R=3  recursive R=3   vanilla
  v5e (16 GB)    1 row     16.4 GB         16.5 GB   35.2 GB
  H100 (80 GB)  64 rows    44.4 GB         48.7 GB   66.4 GB
  v5p (95 GB)   64 rows    44.4 GB         48.7 GB   66.4 GB

A v5e has too little for whole copies; with parallel.fsdp each device holds a part of the parameters.

The paper's corpus is FineWeb-Edu with the tokenizer of SmolLM; the embedded one is far too small for these budgets.
With datasets and huggingface_hub installed (requirements-data.txt), prepare as much of it as the budget reads:

  python -m mor_jax.prepare --config=configs/1p7b.py --config.data.tokenizer=HuggingFaceTB/SmolLM-135M \\
    --config.data.source=hf:HuggingFaceFW/fineweb-edu:sample-100BT

and train with the same two settings.
"""

from mor_jax.recipes import paper


def get_config(variant: str = 'mor'):
  """`configs/1p7b.py`, or its baselines `configs/1p7b.py:recursive` and `configs/1p7b.py:vanilla`."""
  config = paper.training_run(
    '1p7b', variant, num_layers=24, d_model=2048, num_heads=32, num_kv_heads=32, mlp_dim=8192
  )
  config.train.learning_rate = 1.4e-3  # unpublished; that of 360M by the ratio of widths
  return config
