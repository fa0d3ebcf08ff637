"""The tokenizer.model of SentencePiece, which some checkpoints have in place of a tokenizer.json."""

from pathlib import Path

import tokenizers

NAME = 'tokenizer.model'


def read_backend(path: Path) -> tokenizers.Tokenizer:
  """What transformers makes of a tokenizer.model, with the files beside it. Raises ValueError if it cannot be used."""
  try:
    import google.protobuf  # noqa: F401 (transformers needs these two)
    import sentencepiece  # noqa: F401
    import transformers
  except ImportError as error:
    raise ValueError(
      f'{path.name} of SentencePiece has to be converted, and {error.name} is not installed: '
      f'pip install transformers sentencepiece protobuf, or put a tokenizer.json beside it'
    ) from None
  try:
    made = transformers.AutoTokenizer.from_pretrained(
      path.parent, local_files_only=True, trust_remote_code=False, use_fast=True
    )
    return tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # whatever the libraries raise for a damaged file
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(f'transformers cannot convert it: {reason}') from None
