"""Opens the tokenizer of a model directory, of a Hugging Face directory, or of a model on the hub."""

from __future__ import annotations

import json

from convert_weights.open_source import open_tokenizer
from supra_jax.core.files import place
from supra_jax.data.encoding import load_tokenizer
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig


def any_tokenizer(source: str) -> tuple[Tokenizer, ModelConfig]:
  """Returns a model's tokenizer and config, as `load_tokenizer` does, or else as `open_tokenizer`.

  Raises:
    ValueError, OSError: as these two.
  """
  path = place(source) / "config.json"
  ours = path.is_file() and "model_type" not in json.loads(path.read_text())
  return (load_tokenizer if ours else open_tokenizer)(source)
