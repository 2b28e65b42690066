"""Reproduces a table or a figure of the paper; a killed call resumes.

python -m supra_jax.bin.reproduce --table=3 --input=TEXT --workdir=DIR   SUPRA beside its baselines, on two cores
python -m supra_jax.bin.reproduce --table=3 --scale=full                 all commands that the paper's size takes
python -m supra_jax.bin.reproduce --figure=3 --teacher=DIR --models=before=DIR,after=DIR --input=TEXT --output=FILE.json
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.bin.mixer_flag import settings
from supra_jax.core.files import local
from supra_jax.core.schema import from_mapping
from supra_jax.experiments import figures_3_4, full_scale, table_3
from supra_jax.experiments.small_scale import Size, small_scale

_TABLE = flags.DEFINE_enum("table", None, ["3"], "Table of the paper.")
_FIGURE = flags.DEFINE_enum("figure", None, ["3", "4"], "Figure of the paper; 3 and 4 are made together.")
_SCALE = flags.DEFINE_enum("scale", "small", ["small", "full"], "Table 3 with 3 million parameters, or its commands.")
_INPUT = flags.DEFINE_string("input", None, "Text to train on or to compare models on, as prepare_data takes it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of table 3's runs.")
_ROWS = flags.DEFINE_list("rows", None, f"Rows in order of worth. Default: {', '.join(table_3.ROWS)}.")
_HOURS = flags.DEFINE_float("cpu_hours", 24.0, "No run begins after so many hours of processor time.", lower_bound=0)
_TEACHER = flags.DEFINE_string(
  "teacher", None, "Model directory of the teacher. Table 3 trains its own if none is given."
)
_MODELS = flags.DEFINE_list("models", [], "Models to compare with the teacher, NAME=DIR each.")
_SIZE = flags.DEFINE_list(
  "size", [], f"Sizes of table 3 that differ, as in scratch=2000000,rows=2: fields of {Size()}."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write, pictures beside it. Default: in the workdir.")


def _table_3() -> str:
  rows = _ROWS.value or [row for row, what in table_3.ROWS.items() if not _TEACHER.value or what.begins == "teacher"]
  if _SCALE.value == "full":
    return full_scale.plan(rows)
  if not _INPUT.value or not _WORKDIR.value:
    raise ValueError("--scale=small trains models: wanted --input, a text, and --workdir.")
  size, teacher = from_mapping(Size, settings(_SIZE.value), "--size"), _TEACHER.value
  scale = small_scale(_INPUT.value, local(_WORKDIR.value), size, local(teacher) if teacher else None)
  return table_3.report(scale, rows, _output(scale.workdir / "table_3.json"), cpu_hours=_HOURS.value)


def _figures_3_4() -> str:
  if not (_TEACHER.value and _MODELS.value and _INPUT.value and _OUTPUT.value):
    raise ValueError("Figures 3 and 4 want --teacher, --models, --input and --output.")
  return figures_3_4.report(_TEACHER.value, settings(_MODELS.value), _INPUT.value, _output())


def _output(default: Path = Path()) -> Path:
  return local(_OUTPUT.value) if _OUTPUT.value else default


def main() -> None:
  if bool(_TABLE.value) == bool(_FIGURE.value):
    raise ValueError("Wanted one of --table and --figure.")
  print(_table_3() if _TABLE.value else _figures_3_4())


if __name__ == "__main__":
  run(main)
