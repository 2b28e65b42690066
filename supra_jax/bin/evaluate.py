"""Evaluates a model on text, loss and perplexity, or on tasks of lm-evaluation-harness.

python -m supra_jax.bin.evaluate --checkpoint=DIR --input=GLOB
python -m supra_jax.bin.evaluate --checkpoint=DIR --tasks=table1 --output=FILE.json
"""

from __future__ import annotations

from typing import Any

from absl import flags

import supra_jax
from supra_jax.bin import model_flags, task_flags
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.objectives.heldout import perplexity

_load = model_flags.define()
_run_tasks = task_flags.define()
_INPUT = flags.DEFINE_string(
  "input", None, "Text to evaluate on: glob of .txt, .jsonl[.gz|.zst] or .parquet, or pydoc:topics."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the results of --tasks to, with Markdown beside it.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 1024, "Tokens of a piece of the text; the model reads each from a fresh state.", lower_bound=2
)
flags.DEFINE_alias("window", "sequence_length")  # the flag's earlier name
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "Tokens of the text to read; 0 means all.", lower_bound=0)


def main() -> None:
  if _run_tasks(_load, flags.FLAGS.checkpoint, _OUTPUT.value):
    return
  if not _INPUT.value:
    raise ValueError("Nothing to evaluate on: give --input, a text, or --tasks.")
  lm = _load()
  how: dict[str, Any] = {"text_key": _TEXT_KEY.value, "sequence_length": _LENGTH.value, "max_tokens": _MAX_TOKENS.value}
  nll, targets = supra_jax.evaluate(lm, _INPUT.value, **how)
  print(f"loss {nll:.4f} nats a token, perplexity {perplexity(nll):.3f}, {targets} tokens, pieces of {_LENGTH.value}")


if __name__ == "__main__":
  run(with_implementation(main))
