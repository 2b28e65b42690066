"""Evaluates a model on text, loss and perplexity, or on tasks of lm-evaluation-harness.

python -m supra_jax.bin.evaluate --checkpoint=DIR --input=GLOB
python -m supra_jax.bin.evaluate --checkpoint=DIR --tasks=table1 --output=FILE.json
"""

from __future__ import annotations

from absl import flags

from supra_jax.bin import model_flags, task_flags, text_flags
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.core.plain_json import check_output, write_json
from supra_jax.evaluation.perplexity import evaluate_text

_run_tasks = task_flags.define()
_load = model_flags.define(unless="fetch_only")
_how = text_flags.define()
_INPUT = flags.DEFINE_string(
  "input", None, "Text to evaluate on: glob of .txt, .jsonl[.gz|.zst] or .parquet, or pydoc:topics."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "JSON file to write: loss, also by position and by piece of the text; or the results of --tasks."
)


def main() -> None:
  if _run_tasks(_load, flags.FLAGS.checkpoint, _OUTPUT.value):
    return
  if not _INPUT.value:
    raise ValueError("Nothing to evaluate on: give --input, a text, or --tasks.")
  check_output(_OUTPUT.value)
  how = _how()
  loss = evaluate_text(_load(), _INPUT.value, progress=True, **how)
  print(loss)
  if _OUTPUT.value:
    about = {"checkpoint": flags.FLAGS.checkpoint, "input": _INPUT.value, "max_tokens": how["max_tokens"]}
    write_json(_OUTPUT.value, about | loss.values())


if __name__ == "__main__":
  run(with_implementation(main))
