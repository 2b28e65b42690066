"""Reproduces a table or a figure of the paper; a killed call resumes.

python -m supra_jax.bin.reproduce --table=1                              all commands of table 1; --table=2 alike
python -m supra_jax.bin.reproduce --table=1 --models=NAME=DIR,NAME=hf:NAME --output=FILE.json
python -m supra_jax.bin.reproduce --table=2 --models=NAME=DIR --data=qasper=DIR,narrativeqa=DIR --output=FILE.json
python -m supra_jax.bin.reproduce --table=3 --input=TEXT --workdir=DIR   SUPRA beside its baselines, on two cores
python -m supra_jax.bin.reproduce --table=3 --scale=full                 all commands of table 3 at the paper's size
python -m supra_jax.bin.reproduce --figure=1 --models=transformer=DIR,RNN=DIR --output=FILE.json
python -m supra_jax.bin.reproduce --figure=3 --teacher=DIR --models=before=DIR,after=DIR --input=TEXT --output=FILE.json
"""

from __future__ import annotations

from typing import Any

from absl import flags

from supra_jax.bin import reproduced_models, reproduced_runs
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.experiments import figures_3_4, paper_models
from supra_jax.experiments.gathered import named

_TABLE = flags.DEFINE_enum("table", None, ["1", "2", "3"], "Table of the paper.")
_FIGURE = flags.DEFINE_enum("figure", None, ["1", "3", "4"], "Figure of the paper; 3 and 4 are made together.")
_MODELS = flags.DEFINE_list("models", [], "Models, NAME=DIR each; in table 1 hf:NAME for one of transformers too.")
_INPUT = flags.DEFINE_string("input", None, "Text to train on or to compare models on, as prepare_data takes it.")
_TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the teacher. Default in table 3: its own.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write, pictures beside it. Default: in --workdir.")
_of_models = reproduced_models.define()
_of_runs = reproduced_runs.define()


def _given(*wanted: flags.FlagHolder) -> list[Any]:
  """Returns the values of flags; raises ValueError if one has none."""
  if missing := [f"--{flag.name}" for flag in wanted if not flag.value]:
    what = f"--table={_TABLE.value}" if _TABLE.value else f"--figure={_FIGURE.value}"
    raise ValueError(f"{what} wants {', '.join(missing)} too.")
  return [flag.value for flag in wanted]


def main() -> None:
  if bool(_TABLE.value) == bool(_FIGURE.value):
    raise ValueError("Wanted one of --table and --figure.")
  if _TABLE.value == "3":
    print(_of_runs(_INPUT.value, _TEACHER.value, _OUTPUT.value))
  elif _FIGURE.value in ("3", "4"):
    teacher, models, text, output = _given(_TEACHER, _MODELS, _INPUT, _OUTPUT)
    print(figures_3_4.report(teacher, named(models), text, output))
  elif _TABLE.value and not _MODELS.value:
    print(paper_models.commands(int(_TABLE.value)))
  else:
    print(_of_models(_TABLE.value, *_given(_MODELS, _OUTPUT)))


if __name__ == "__main__":
  run(with_implementation(main))
