"""Takes a trained model elsewhere: python -m mor_jax.convert --checkpoint=RUN --output=FOLDER

Writes the newest checkpoint of a vanilla model with its tokenizer as a Llama folder (safetensors,
config.json, tokenizer.json), which `transformers` opens.
"""

import jax
from absl import flags
from rich.console import Console

from mor_jax import cli
from mor_jax.config import ConfigError
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import huggingface
from mor_jax.training.restore import load_run

FLAGS = flags.FLAGS
flags.DEFINE_string('checkpoint', None, 'folder of the run')
flags.DEFINE_string('output', None, 'folder to write, which must not exist')


def main() -> None:
  """Reads, converts and writes. Raises ConfigError before anything is written."""
  for name in ('checkpoint', 'output'):
    if not FLAGS[name].value:
      raise ConfigError(f'--{name} is missing (--help shows an example)')
  run = load_run(FLAGS.checkpoint)
  tokenizer = Tokenizer.load(run.folder.tokenizer, run.config.data.separator)
  huggingface.save(FLAGS.output, run.model, jax.device_get(run.variables), tokenizer)
  console = Console()
  console.print(f'wrote the model of step {run.step} to {FLAGS.output}', highlight=False, soft_wrap=True)


if __name__ == '__main__':
  cli.run(main, __doc__, with_config=False)
