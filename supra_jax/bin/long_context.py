"""Answers questions about long documents, table 2 of the paper: Qasper and NarrativeQA, prompts cut to several lengths.

`python -m supra_jax.bin.long_context --checkpoint=DIR --data=DIR --task=qasper --output=DIR`
"""

from __future__ import annotations

from typing import Any

from absl import flags

from supra_jax.bin import model_flags
from supra_jax.bin.choices import whole_numbers
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.evaluation import long_context
from supra_jax.evaluation.questions import SPLITS, TASKS, read_questions
from supra_jax.inference.lm import ROWS

_load = model_flags.define()
_TASK = flags.DEFINE_enum("task", None, TASKS, "The questions.", required=True)
_DATA = flags.DEFINE_string(
  "data", None, "Directory with the task's files, as supra_jax/evaluation/README.md lists them.", required=True
)
_SPLIT = flags.DEFINE_enum("split", "validation", list(SPLITS), "Split whose questions are answered.")
_LENGTHS = flags.DEFINE_list("lengths", "2048,4096,8192,16384", "Most tokens of prompt and answer together.")
_SHOTS = flags.DEFINE_integer(
  "shots", None, "Examples from the split train in the prompt. Default: 2 for qasper, 0 for narrativeqa.", lower_bound=0
)
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Most tokens of an answer.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 0, "Questions to answer, from the first; 0 means all.", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", ROWS, "Most answers that decode at a time.", lower_bound=1)
_YARN = flags.DEFINE_float("yarn_factor", None, "Stretch the rotary embedding by YaRN, so many times.", lower_bound=1.0)
_ORIGINAL = flags.DEFINE_integer(
  "yarn_original", None, "Tokens of the longest text in training, for YaRN. Default: as the checkpoint says."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for answers and results; a run goes on in it.", required=True)


def main() -> None:
  questions = read_questions(_TASK.value, _DATA.value, _SPLIT.value)
  shots = long_context.SHOTS[_TASK.value] if _SHOTS.value is None else _SHOTS.value
  before = long_context.drawn_examples(_TASK.value, _DATA.value, shots)
  lm, name = _load(), flags.FLAGS.checkpoint
  about: dict[str, Any] = {"fingerprint": lm.checkpoint, "dtype": flags.FLAGS.dtype, "quantize": flags.FLAGS.quantize}
  if _YARN.value is not None:
    lm, name = long_context.with_yarn(lm, _YARN.value, _ORIGINAL.value), f"{name}, YaRN {_YARN.value:g}"
    about |= {"yarn_factor": _YARN.value, "yarn_original": lm.config.rope.original_max_positions}
  about |= {"model": name, "split": _SPLIT.value, "shots": shots}
  how: dict[str, Any] = {"limit": _LIMIT.value, "max_new_tokens": _NEW.value, "rows": _ROWS.value, "settings": about}
  how |= {"before": before, "progress": True}
  results = long_context.answer_questions(
    lm, _TASK.value, questions, whole_numbers(_LENGTHS) or [], _OUTPUT.value, **how
  )
  print(long_context.table(results), end="")


if __name__ == "__main__":
  run(with_implementation(main))
