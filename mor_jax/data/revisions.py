"""Which revision of a dataset on the Hugging Face Hub is meant: the newest, or without a network the last one used."""

import contextlib
import hashlib
import pathlib

from mor_jax.files import write_atomically

PATIENCE = 10  # seconds for the hub to answer


def current(name: str, notes: pathlib.Path) -> str | None:
  """The commit of the dataset's main branch; None if it was never known.

  Args:
    name: of the dataset on the hub.
    notes: folder in which the answer is kept, for when there is no network.
  """
  note = notes / f'{hashlib.sha256(name.encode()).hexdigest()[:16]}.txt'
  found = _ask(name)
  if found is None:
    return note.read_text().strip() if note.exists() else None
  with contextlib.suppress(OSError):  # a folder that cannot be written is reported where data is prepared
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, f'{found}\n')
  return found


def _ask(name: str) -> str | None:
  """What the hub says; None without the package or an answer."""
  try:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
      return None
    return huggingface_hub.HfApi().dataset_info(name, timeout=PATIENCE).sha
  except Exception:  # no network, no such dataset, gated: whoever opens it says which
    return None
