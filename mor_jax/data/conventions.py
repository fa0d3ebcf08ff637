"""What a model says about texts beyond its vocabulary: what ends them, how long they may be, its chat template."""

import dataclasses
import json
from typing import Any

SIDE_FILES = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
  'chat_template.jinja',
)
"""Files of a checkpoint of Hugging Face that are kept as they are."""
CONVENTIONS = 'conventions.json'  # of a run folder
CONFIG, SINGLE = 'tokenizer_config.json', 'chat_template.jinja'  # where templates are


@dataclasses.dataclass(frozen=True)
class Conventions:
  """What came with an imported model, kept for those who generate with it, train from it or export it again.

  Attributes:
    ends: ids of all tokens that end a text, the separator of documents first.
    max_positions: longest text that the model was made for; None: not known.
    files: by name (SIDE_FILES), the text of each file that there was.
  """

  ends: tuple[int, ...]
  max_positions: int | None = None
  files: dict[str, str] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """As `from_json` reads it."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'Conventions':
    """Raises TypeError, ValueError or KeyError for other fields."""
    ends, longest, files = tuple(fields['ends']), fields['max_positions'], dict(fields['files'])
    if not all(type(end) is int for end in ends) or type(longest) not in (int, type(None)):
      raise TypeError('its ends and its longest text must be whole numbers')
    if not all(name in SIDE_FILES and isinstance(text, str) for name, text in files.items()):
      raise ValueError(f'its files must be among {", ".join(SIDE_FILES)}')
    return cls(ends, longest, files)

  def with_chats(self, chat: dict[str, Any]) -> 'Conventions':
    """Those of a model that has learned conversations.

    Args:
      chat: what the dataset says of them: 'template', 'tokens', and 'ends', ids that end what the assistant says.
    """
    tokens = {name: token for name, token in chat['tokens'].items() if token}
    config = json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', **tokens}, indent=2) + '\n'
    files = {CONFIG: config, **self.files, SINGLE: chat['template']}
    return dataclasses.replace(self, ends=tuple(dict.fromkeys((*self.ends, *chat['ends']))), files=files)
