"""The settings of a run, section by section. Rules across settings are in validation.py."""

import dataclasses
from typing import Any

from mor_jax.config.model import ModelConfig
from mor_jax.config.typed import setting


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Documents, tokenizer and rows."""

  source: str = setting(
    'embedded',
    "documents: embedded, the running Python's documentation and sources; files:PATTERN (.txt .md .jsonl .json "
    '.ndjson, also .gz .zst .bz2 .xz, and .parquet; a file, a folder or a glob, several separated by commas); '
    'tfds:NAME/SPLIT/KEY or tfds:FOLDER/SPLIT/KEY; hf:DATASET:CONFIG:SPLIT (DATASET@REVISION keeps to one); '
    'prepared:FOLDER, a dataset made before; a mixture as 0.7*SOURCE;0.3*SOURCE; or synthetic:TASK,KEY=VALUE..., rows '
    'whose tokens say how hard they are, with words of their own: chase, automaton, permutations, chains, copy (docs/data.md)',
  )
  format: str = setting(
    'text',
    'what records are: text, documents under data.text_key; chat, conversations (messages, prompt and completion, or '
    "conversations) through the tokenizer's chat template, of which only what the assistant says is learned",
    ('text', 'chat'),
  )
  chat_template: str | None = setting(
    None,
    'chat: file of a jinja template, or folder of a run or model that has one; none: the one that came with the tokenizer',
  )
  too_long: str = setting(
    'cut',
    'chat: conversations longer than data.seq_len are cut at its end, or skipped',
    ('cut', 'skip'),
  )
  text_key: str = setting(
    'text', 'key of the text in JSON, .parquet files and hf: datasets; meta.text leads into nested ones'
  )
  max_bad_fraction: float = setting(
    0.001, 'share of documents that may be undecodable (not UTF-8, not JSON, no text) and are skipped'
  )
  max_unknown_fraction: float = setting(
    0.05,
    'share of the tokens that may stand for what the tokenizer has no token for, or would have stood for it',
  )
  drop_duplicates: bool = setting(False, 'leave out documents whose text came before')
  tokenizer: str = setting(
    'bpe',
    'bpe: trained on the corpus; bytes: one token a byte; source: that of init.source; else the path of a '
    'tokenizer.json, or a model on the Hugging Face hub, such as HuggingFaceTB/SmolLM-135M',
  )
  vocab_size: int = setting(4096, 'entries of the trained tokenizer (bpe), special tokens included')
  separator: str = setting('<|endoftext|>', 'token of the vocabulary that ends every document')
  begin: str | None = setting(
    'auto',
    "token of the vocabulary before every document and prompt; auto: the one that the tokenizer's own template puts "
    'there, if any; none: nothing',
  )
  packing: str = setting(
    'concat',
    'documents to rows: concat, one after the other and cut, as in the paper; first_fit, whole documents '
    'where there is room, padding where there is none',
    ('concat', 'first_fit'),
  )
  seq_len: int = setting(2048, 'tokens T in a row')
  segment_mask: bool = setting(
    True, 'tokens attend within their document only, positions restart with it; false: as in the paper'
  )
  validation_fraction: float = setting(0.05, 'share of the documents held out for validation')
  max_documents: int | None = setting(None, 'stop after this many documents; none: the whole corpus')
  seed: int = setting(0, 'shuffles the rows, anew in every epoch')
  cache_dir: str | None = setting(
    None, 'folder for prepared datasets; none: $XDG_CACHE_HOME/mor_jax or ~/.cache/mor_jax'
  )
  workers: int | None = setting(None, 'processes that tokenise while preparing; none: one for each core')
  prefetch: int = setting(2, 'batches read ahead on threads')
  live: bool = setting(
    False,
    'tokenise and pack while training, for streams that cannot be prepared first; a run resumes on the same '
    'number of hosts only',
  )
  live_validation_rows: int = setting(
    256, 'live: rows that validation uses, of the held-out documents at the head of the stream'
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation. Defaults are those of the released 360M runs."""

  steps: int = setting(10000, 'optimiser steps; train.flops_budget, where it is set, decides instead')
  flops_budget: float | None = setting(
    None,
    'train for this many forward FLOPs, as the paper counts them; sets train.steps; none: use train.steps',
  )
  global_batch: int = setting(1024, 'rows in an optimiser step, over all devices')
  accumulation: int = setting(1, 'micro-batches an optimiser step is split into')
  loss_chunk: int | None = setting(
    None, 'tokens of a device whose logits exist at once; 0: all; none: 512 on CPU, 2048 on TPU and GPU'
  )
  ramp_batch: int | None = setting(
    None,
    'rows in the first optimiser steps, which double until train.global_batch is reached, by the number of '
    'micro-batches: a multiple of train.global_batch / train.accumulation; none: the full batch at once',
  )
  ramp_steps: int = setting(0, 'optimiser steps until the full batch, shared equally by the smaller sizes')
  recursions: int | None = setting(
    None, 'recursions that tokens take at most in training (recursive and mor); none: all'
  )
  growth: tuple[float, ...] | None = setting(
    None,
    'growing recursions: begin with one, and add one after each of these shares of the steps, rising; none: all from '
    'the start',
  )
  readout_rows: float = setting(
    0.0,
    'share of the rows whose tokens stop after a number of recursions that is drawn for the row, so that a model learns '
    'to be read out after each and may be cut anywhere (recursive and mor)',
  )
  trainable: str = setting(
    'all',
    'parameters that are trained, the others stay bit for bit: all, routers, lora, block, or regular expressions '
    'that find something in paths such as block/attention/query/kernel; several separated by commas',
  )
  stages: str | None = setting(
    None,
    'what is trained in turn, with the share of the steps of all but the last: routers:0.1;all is the routers alone '
    'for a tenth of the steps, then everything; none: train.trainable all the time',
  )
  learning_rate: float = setting(3e-3, 'peak learning rate')
  schedule: str = setting('wsd', 'wsd: warm-up, stable, linear decay; cosine', ('wsd', 'cosine'))
  warmup_steps: int = setting(500, 'steps of linear warm-up')
  decay_fraction: float = setting(0.2, 'wsd: share of the steps spent in the final decay')
  final_learning_rate: float = setting(0.0, 'learning rate at the last step')
  weight_decay: float = setting(0.1, 'decoupled weight decay, on matrices only')
  beta1: float = setting(0.9, 'AdamW: decay of the first moment')
  beta2: float = setting(0.95, 'AdamW: decay of the second moment')
  adam_epsilon: float = setting(1e-8, 'AdamW: epsilon')
  clip_norm: float = setting(1.0, 'largest global norm of the gradient')
  on_nonfinite: str = setting(
    'halt', 'a loss or gradient that is not finite: halt before the update, or skip it', ('halt', 'skip')
  )
  max_skipped: int = setting(10, 'updates of a run that on_nonfinite=skip may leave out; the next one halts')
  spike_zscore: float = setting(
    6.0, 'report a loss this many standard deviations above the mean of the last 100; 0: never'
  )
  hang_seconds: float = setting(
    1800.0,
    'print the stack of every thread when no step, validation batch or save ends for this long; 0: never',
  )
  exit_on_hang: bool = setting(
    False, 'after train.hang_seconds end the process with exit code 70, so that launchers restart it'
  )
  seed: int = setting(0, 'initial parameters')
  log_every: int = setting(10, 'steps between two lines of metrics')
  eval_every: int = setting(1000, 'steps between two validations; 0: at the end only')
  eval_rows: int | None = setting(None, 'rows of the validation split to use; none: all')
  sample_tokens: int = setting(64, 'length of the text sampled at the end; 0: none')
  sample_prompt: str = setting('The ', 'beginning of the text sampled at the end')
  sample_temperature: float = setting(0.7, 'temperature of the sampled text; 0: greedy')


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where a new run gets its initial weights. A checkpoint of the run itself takes precedence."""

  source: str | None = setting(
    None,
    'model to begin from (also --init_from=FOLDER): a vanilla one, a run or a checkpoint of Hugging Face, or a run of '
    'the same model; none: random weights',
  )
  method: str = setting(
    'stepwise',
    'source layers that the shared block is made of: stepwise, at equal distances; the first (lower) or last '
    '(upper); a random choice; average, the mean of all layers that a shared one replaces',
    ('stepwise', 'average', 'lower', 'upper', 'random'),
  )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Distillation from a teacher model during training."""

  weight: float = setting(
    0.0, 'weight of KL(teacher || model) * temperature^2 beside the loss on the text; 0: no teacher'
  )
  temperature: float = setting(1.0, 'divides the logits of both')
  top_k: int | None = setting(None, "use only this many of the teacher's most probable tokens; none: all")
  teacher: str | None = setting(
    None, 'folder of a run or checkpoint of Hugging Face with the same tokenizer; none: init.source'
  )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save checkpoints and which to keep."""

  every_steps: int = setting(1000, 'steps between two checkpoints; the last step is always saved')
  every_minutes: float | None = setting(None, 'also save when the last checkpoint is this many minutes old')
  max_unsaved_steps: int | None = setting(
    None,
    'train at most this many steps past the newest finished checkpoint, then wait for the one being written; '
    'none: no waiting',
  )
  keep: int = setting(2, 'newest checkpoints kept')
  keep_every: int | None = setting(None, 'also keep one checkpoint every this many steps')
  keep_best: int = setting(
    0,
    'also keep this many checkpoints with the lowest validation loss; each is then validated when it is saved',
  )
  folder: str | None = setting(
    None, 'where checkpoints go: a folder, gs://, s3://, az://; none: checkpoints/ in the run folder'
  )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """How rows and parameters are sharded. The product of all sizes is the number of devices."""

  replica: int = setting(-1, 'copies of the parameters within a slice; -1: as many as devices are left')
  fsdp: int = setting(1, 'parts that parameters and optimiser state are split into within a slice; -1 fills')
  tensor: int = setting(1, 'parts that heads, MLP and vocabulary of a layer are split into; -1 fills')
  dcn_replica: int = setting(1, 'copies of the parameters over slices (pods joined by network); -1 fills')
  dcn_fsdp: int = setting(1, 'parts of the parameters over slices; -1 fills')


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run. `resolve` builds and validates one from a ConfigDict."""

  name: str = setting('default', 'names the run and its folder, runs/NAME')
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  init: InitConfig = InitConfig()
  distill: DistillConfig = DistillConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  parallel: ParallelConfig = ParallelConfig()

  def to_dict(self) -> dict[str, Any]:
    """The settings as a plain nested dict, as written to config.json. `resolve` reads it back."""
    return dataclasses.asdict(self)
