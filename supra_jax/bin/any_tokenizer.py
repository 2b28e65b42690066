"""Opens the tokenizer of a model directory, of a Hugging Face directory, or of a model on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple, cast

from convert_weights.open_source import open_tokenizer
from supra_jax.core.files import place
from supra_jax.data.encoding import read_tokenizer
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.presets import tiny


class Opened(NamedTuple):
  """A tokenizer.

  Attributes:
    tokenizer: the tokenizer.
    vocab_size: number of rows of its model's embedding; of a tokenizer alone, the number of its ids.
    files: what a model directory has of it: file name -> contents.
  """

  tokenizer: Tokenizer
  vocab_size: int
  files: Mapping[str, bytes]


def any_tokenizer(source: str) -> Opened:
  """Opens a tokenizer.

  Args:
    source: a model directory; a Hugging Face directory, or its name on the hub; or a directory with a tokenizer alone.

  Raises:
    ValueError, OSError: as `read_tokenizer`, `open_tokenizer` and `Tokenizer.from_files`.
  """
  path = place(source) / "config.json"
  if place(source).is_file():
    raise ValueError(f"{source} is a file: wanted the directory that it is in.")
  try:
    ours = path.is_file() and "model_type" not in json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  files, config = (read_tokenizer if ours else open_tokenizer)(source)
  if config is not None:
    return Opened(cast(Tokenizer, Tokenizer.from_files(files, config)), config.vocab_size, files)
  eos = json.loads(files.get("generation_config.json", b"{}")).get("eos_token_id")
  ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
  # Of this config only the ids are read, and the number of rows, which is that of no model yet.
  any_model = tiny().replace(vocab_size=2**31 - 1, bos_token_id=None, eos_token_ids=ends)
  tokenizer = cast(Tokenizer, Tokenizer.from_files(files, any_model))
  return Opened(tokenizer, tokenizer.vocab_size, files)
