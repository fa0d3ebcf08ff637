"""SmolLM2-135M, tuned to conversations, as a MoR, recursive or vanilla model (docs/instruction_tuning.md).

  python -m mor_jax.train --config=configs/sft_smollm2_135m.py --init_from=SMOLLM2 \
    --config.data.source='files:chats/*.jsonl'

SMOLLM2 is the folder of a vanilla model, as the Hugging Face hub has it or as a run; or the run of a MoR that
configs/uptrain_smollm2_135m.py made of it, which is the way for few conversations: it is taken as it is, routers included.
SmolLM2-135M-Instruct brings its chat template; for the plain model, whose vocabulary has the same special tokens, name one:

  ... --config.data.chat_template=SMOLLM2_INSTRUCT     a folder that has one, or a file of jinja
  ... --config.data.source=embedded                    questions about Python's library, which need no download
  ... --config.data.too_long=skip                      leave out what is longer than a row instead of cutting it
  ... --config.train.stages='routers:0.1;all'          routers alone at first, then everything
  ... --config.train.trainable=lora --config.model.lora_rank=16 --config.model.lora_sharing=one
                                                       adapters alone, which can be merged (mor_jax.convert --merge_lora)
  python -m mor_jax.generate --chat --checkpoint=runs/sft_smollm2_135m-mor-r2

Learning rate, as a starting point. A model that only goes on from where it was, a vanilla one or an uptrained MoR: 1e-4 to
2e-4, a thirtieth to a fifteenth of the rate from scratch. A MoR or recursive model that begins from a vanilla one first has
to recover from sharing its layers, as in any uptraining: 5e-4, above which the original unlearns first
(docs/uptraining.md). It begins far from it (12 nats before any step, where the original has 3.3), and recovering takes more
tokens than most sets of conversations have, so uptrain on text first. Low-rank changes for each recursion
(--config.model.lora_rank=64) shorten the way; lower the rate where the loss on held-out answers rises.

Routers. Those of an uptrained MoR go on: set --config.model.capacity_warmup_steps=0. From a vanilla model they begin fresh,
with small weights (2e-3), gates around 1 and capacities that fall from 1 over the first third of the steps, as in every
uptraining. Capacities count all tokens of a row and the routers' own loss learns from
all of them, those of the user too; only the loss of the answers is masked. With train.steps the warm-up of the
capacities has to change too: --config.model.capacity_warmup_steps. What generates is threshold routing: compare both
kinds with python -m mor_jax.evaluate after a tuning, and calibrate again where thresholds had been calibrated.

Settings are for one accelerator of 16 GB or more: 1024 x 64 tokens a step.
"""

from mor_jax.recipes import uptraining as uptraining_defaults

VANILLA_LEARNING_RATE = 1e-4  # nothing has to be recovered


def get_config(variant: str = 'mor'):
  """`configs/sft_smollm2_135m.py`, or its `:recursive` and `:vanilla`."""
  config = uptraining_defaults.uptraining_run(
    'sft_smollm2_135m', variant, steps=1500, **uptraining_defaults.SMOLLM2_135M
  )
  config.data.format = 'chat'
  config.data.packing = 'first_fit'  # no conversation goes on in a row that lacks its beginning
  config.data.seq_len = 1024
  config.train.global_batch = 64
  config.train.accumulation = 8
  config.train.eval_every = 250
  config.train.eval_rows = 256
  config.train.sample_tokens = 0  # what follows a bare beginning says little: see generate --chat
  config.checkpoint.every_steps = 250
  if variant == 'vanilla':
    config.train.learning_rate = VANILLA_LEARNING_RATE
  return config
