"""The paper's 730M models: 26 layers of width 1536.

  python -m mor_jax.train --config=configs/730m.py                                     mor, R=3
  python -m mor_jax.train --config=configs/730m.py --config.model.num_recursions=2     mor, R=2
  python -m mor_jax.train --config=configs/730m.py:recursive                           or :vanilla
  python -m mor_jax.train --config=configs/730m.py --config.train.flops_budget=5e18    another budget
  python -m mor_jax.train --config=configs/730m.py --config.train.flops_budget=none --config.train.steps=100

Parameters outside the 75 M of the embedding, budget in forward FLOPs as the paper counts them, steps of
1024 x 2048 tokens, and the paper's validation loss in nats per token, which is on FineWeb-Edu with the
tokenizer of SmolLM (another corpus has another loss):

                       params     budget    steps    tokens      loss
  mor R=3               252 M    16.5e18    7,088   14.86 B    2.7438
  recursive R=3         252 M    16.5e18    4,810   10.09 B    2.7886
  vanilla               654 M    16.5e18    4,810   10.09 B    2.7048
  mor R=3               252 M       5e18    2,148    4.50 B    3.0067
  recursive R=3         252 M       5e18    1,458    3.06 B    3.1640
  vanilla               654 M       5e18    1,458    3.06 B    3.0821
  mor R=3               252 M       2e18      859    1.80 B    3.3300
  recursive R=3         252 M       2e18      583    1.22 B    3.8136
  vanilla               654 M       2e18      583    1.22 B    3.7164

No loss is published for other numbers of recursions.

Memory of a device, estimated (mor_jax/planning/memory.py), with as many rows at once, that is
global_batch / accumulation / devices (64 on one device, with 16 micro-batches):

                           mor R=3  recursive R=3   vanilla
  v5e (16 GB)    1 row      7.5 GB          7.5 GB   15.6 GB
  H100 (80 GB)  64 rows    25.1 GB         28.3 GB   36.3 GB
  v5p (95 GB)   64 rows    25.1 GB         28.3 GB   36.3 GB

On a v5e the vanilla model barely fits; with parallel.fsdp each device holds a part of the parameters.

The paper's corpus is FineWeb-Edu with the tokenizer of SmolLM; the embedded one is far too small for these budgets.
With datasets and huggingface_hub installed (requirements-data.txt), prepare as much of it as the budget reads:

  python -m mor_jax.prepare --config=configs/730m.py --config.data.tokenizer=HuggingFaceTB/SmolLM-135M \\
    --config.data.source=hf:HuggingFaceFW/fineweb-edu:sample-100BT

and train with the same two settings.
"""

from mor_jax.recipes import paper


def get_config(variant: str = 'mor'):
  """`configs/730m.py`, or its baselines `configs/730m.py:recursive` and `configs/730m.py:vanilla`."""
  config = paper.training_run(
    '730m', variant, num_layers=26, d_model=1536, num_heads=24, num_kv_heads=8, mlp_dim=4096
  )
  config.train.learning_rate = 2e-3  # unpublished; that of 360M by the ratio of widths
  return config
