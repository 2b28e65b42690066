"""Reproduces a table of the paper: `python -m supra_jax.bin.reproduce --table=3 --input=TEXT --workdir=DIR`.

--table=3 trains SUPRA beside T2R, the linear transformer, Mamba and the transformer, small enough for two cores. With
--scale=full it prints all commands that the paper's size takes. A killed call resumes.
"""

from __future__ import annotations

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.bin.mixer_flag import settings
from supra_jax.core.files import local
from supra_jax.core.schema import from_mapping
from supra_jax.experiments import full_scale, table_3
from supra_jax.experiments.small_scale import Size, small_scale

_TABLE = flags.DEFINE_enum("table", None, ["3"], "Table of the paper.", required=True)
_SCALE = flags.DEFINE_enum(
  "scale", "small", ["small", "full"], "small: models of 3 million parameters. full: commands."
)
_INPUT = flags.DEFINE_string("input", None, "Text to train on, as prepare_data takes it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that everything is written to.")
_ROWS = flags.DEFINE_list("rows", None, f"Rows in order of worth. Default: {', '.join(table_3.ROWS)}.")
_HOURS = flags.DEFINE_float("cpu_hours", 24.0, "No run begins after so many hours of processor time.", lower_bound=0)
_TEACHER = flags.DEFINE_string("teacher", None, "Model directory of a teacher, in place of the small scale's own.")
_SIZE = flags.DEFINE_list("size", [], f"Sizes that differ, as in teacher=2000000,rows=2: fields of {Size()}.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write, a plot beside it. Default: WORKDIR/table_3.json.")


def main() -> None:
  rows = _ROWS.value or [row for row, what in table_3.ROWS.items() if not _TEACHER.value or what.begins == "teacher"]
  if _SCALE.value == "full":
    print(full_scale.plan(rows))
    return
  if not _INPUT.value or not _WORKDIR.value:
    raise ValueError("--scale=small trains models: wanted --input, a text, and --workdir.")
  size = from_mapping(Size, settings(_SIZE.value), "--size")
  teacher = local(_TEACHER.value) if _TEACHER.value else None
  scale = small_scale(_INPUT.value, local(_WORKDIR.value), size, teacher)
  output = local(_OUTPUT.value) if _OUTPUT.value else scale.workdir / "table_3.json"
  print(table_3.report(scale, rows, output, cpu_hours=_HOURS.value))
  print(f"\nLeft in {scale.workdir}: runs of all rows. Written: {output}.")


if __name__ == "__main__":
  run(main)
