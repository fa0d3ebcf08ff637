"""SmolLM2-135M, uptrained to a MoR or recursive model (docs/uptraining.md).

  python -m mor_jax.train --config=configs/uptrain_smollm2_135m.py --init_from=SMOLLM2 --config.data.source='files:...'

SMOLLM2 is the folder of the model (config.json, model.safetensors, tokenizer.json), as the Hugging Face hub
has it. Two recursions are 1 + 2 x 14 + 1 layers, the depth of the original; three are 1 + 3 x 10 + 1 = 32, as
in the paper, of which two stand for a layer twice. 29 layers leave one out:

  ... --config.model.num_recursions=3 --config.model.num_layers=29
  ... --config.init.method=average             other layers: stepwise (default), average, lower, upper, random
  ... --config.train.stages='routers:0.1;all'  the routers alone for a tenth of the steps, then everything
  ... --config.distill.weight=1                with the logits of the original as targets too
  ... --config.model.lora_rank=64              with low-rank changes for each recursion, from the original's layers

Settings are for one accelerator of 16 GB or more: 100 M tokens of 1024 x 64 a step.
"""

from mor_jax.recipes import uptraining as uptraining_defaults


def get_config(variant: str = 'mor'):
  """`configs/uptrain_smollm2_135m.py`, or its `:recursive` and `:vanilla`."""
  config = uptraining_defaults.uptraining_run(
    'uptrain_smollm2_135m', variant, steps=1500, **uptraining_defaults.SMOLLM2_135M
  )
  config.data.seq_len = 1024
  config.train.global_batch = 64
  config.train.accumulation = 8
  config.train.eval_every = 250
  config.train.eval_rows = 256
  config.checkpoint.every_steps = 250
  return config
