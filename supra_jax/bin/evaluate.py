"""Evaluates a model on text, loss and perplexity: `python -m supra_jax.bin.evaluate --checkpoint=DIR --input=GLOB`."""

from __future__ import annotations

from absl import flags

from supra_jax.bin import model_flags, text_flags
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.core.plain_json import write_json
from supra_jax.evaluation.perplexity import evaluate_text

_load = model_flags.define()
_how = text_flags.define()
_INPUT = flags.DEFINE_string(
  "input", None, "Text to evaluate on: glob of .txt, .jsonl[.gz|.zst] or .parquet, or pydoc:topics.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write: loss, also by position and by piece of the text.")


def main() -> None:
  how = _how()
  loss = evaluate_text(_load(), _INPUT.value, progress=True, **how)
  print(loss)
  if _OUTPUT.value:
    about = {"checkpoint": flags.FLAGS.checkpoint, "input": _INPUT.value, "max_tokens": how["max_tokens"]}
    write_json(_OUTPUT.value, about | loss.values())


if __name__ == "__main__":
  run(with_implementation(main))
