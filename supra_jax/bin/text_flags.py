"""The flags that say how a text is read for its loss: --sequence_length, --stride, --bos and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from absl import flags

from supra_jax.evaluation.perplexity import Bos

flags.disclaim_key_flags()  # --help of each program lists them as its own
_FLAGS = ("text_key", "sequence_length", "stride", "bos", "max_tokens", "batch_size")
_LENGTH = (
  "Tokens of a piece of the text; the model reads each from a fresh state. 0: the text is read once, in one piece, and "
  "the state carried on."
)
_STRIDE = (
  "Tokens from the beginning of a piece of the text to that of the next. Each token is scored once, behind the first "
  "piece with at least sequence_length - stride tokens before it. Default: sequence_length; pieces do not overlap."
)
_BOS = "Where a begin-of-text token is read. Default: before the text if the tokenizer puts one there, else never."


def define() -> Callable[[], dict[str, Any]]:
  """Defines the flags, and returns a function that returns their values as arguments of `evaluate_text`."""
  flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
  flags.DEFINE_integer("sequence_length", 1024, _LENGTH, lower_bound=0)
  flags.DEFINE_alias("window", "sequence_length")  # the flag's earlier name
  flags.DEFINE_integer("stride", None, _STRIDE, lower_bound=1)
  flags.DEFINE_enum("bos", None, get_args(Bos), _BOS)
  flags.DEFINE_integer("max_tokens", 0, "Tokens of the text to read; 0 means all.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 0, "Pieces of the text to read at a time; 0: 4096 tokens of them.", lower_bound=0)
  return lambda: {name: flags.FLAGS[name].value for name in _FLAGS}
