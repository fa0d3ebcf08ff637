"""The paper's main models, 360M: 32 layers of width 960 (34 with four recursions).

  python -m mor_jax.train --config=configs/360m.py                                     mor, R=3
  python -m mor_jax.train --config=configs/360m.py --config.model.num_recursions=2     mor, R=2
  python -m mor_jax.train --config=configs/360m.py:recursive                           or :vanilla
  python -m mor_jax.train --config=configs/360m.py --config.train.flops_budget=5e18    another budget
  python -m mor_jax.train --config=configs/360m.py --config.train.flops_budget=none --config.train.steps=100

Parameters outside the 47 M of the embedding, budget in forward FLOPs as the paper counts them, steps of
1024 x 2048 tokens, and the paper's validation loss in nats per token, which is on FineWeb-Edu with the
tokenizer of SmolLM (another corpus has another loss):

                       params     budget    steps    tokens      loss
  mor R=2               167 M    16.5e18   12,619   26.46 B    2.7511
  mor R=3               118 M    16.5e18   14,160   29.70 B    2.7925
  mor R=4                98 M    16.5e18   14,216   29.81 B    2.8204
  mor R=3 shared        118 M    16.5e18   14,672   30.77 B    2.7983
  mor R=3 token         118 M    16.5e18   14,160   29.70 B    2.9163
  recursive R=2         167 M    16.5e18    9,438   19.79 B    2.8079
  recursive R=3         118 M    16.5e18    9,438   19.79 B    2.8466
  recursive R=4          98 M    16.5e18    8,883   18.63 B    2.8781
  vanilla               315 M    16.5e18    9,438   19.79 B    2.7824
  mor R=3               118 M       5e18    4,291    9.00 B    2.9161
  recursive R=3         118 M       5e18    2,860    6.00 B    3.0722
  vanilla               315 M       5e18    2,860    6.00 B    3.0097
  mor R=3               118 M       2e18    1,716    3.60 B    3.1026
  recursive R=3         118 M       2e18    1,144    2.40 B    3.4864
  vanilla               315 M       2e18    1,144    2.40 B    3.3785

`shared` is --config.model.kv=shared; `token` is --config.model.router=token_choice
--config.model.router_z_loss_weight=1e-5.

Memory of a device, estimated (mor_jax/planning/memory.py), with as many rows at once, that is
global_batch / accumulation / devices (64 on one device, with 16 micro-batches):

                           mor R=3  recursive R=3   vanilla
  v5e (16 GB)   16 rows     6.4 GB          7.1 GB   11.0 GB
  H100 (80 GB)  64 rows    15.9 GB         18.4 GB   22.3 GB
  v5p (95 GB)   64 rows    15.9 GB         18.4 GB   22.3 GB

The paper's corpus is FineWeb-Edu with the tokenizer of SmolLM; the embedded one is far too small for these budgets.
With datasets and huggingface_hub installed (requirements-data.txt), prepare as much of it as the budget reads:

  python -m mor_jax.prepare --config=configs/360m.py --config.data.tokenizer=HuggingFaceTB/SmolLM-135M \\
    --config.data.source=hf:HuggingFaceFW/fineweb-edu:sample-100BT

and train with the same two settings.
"""

from mor_jax.recipes import paper


def get_config(variant: str = 'mor'):
  """`configs/360m.py`, or its baselines `configs/360m.py:recursive` and `configs/360m.py:vanilla`."""
  config = paper.training_run(
    '360m', variant, num_layers=32, d_model=960, num_heads=15, num_kv_heads=5, mlp_dim=2560
  )
  config.train.learning_rate = 3e-3  # published
  return config
