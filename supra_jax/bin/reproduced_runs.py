"""The flags of `reproduce` for table 3, whose rows are trained."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from supra_jax.bin.mixer_flag import settings
from supra_jax.core.files import local
from supra_jax.core.schema import from_mapping
from supra_jax.experiments import full_scale, table_3
from supra_jax.experiments.small_scale import Size

flags.disclaim_key_flags()  # --help of each program lists them as its own
_SIZES = f"table 3: sizes that differ, as in scratch=2000000,rows=2, which are fields of {Size()}."


def define() -> Callable[[str | None, str | None, str | None], str]:
  """Defines the flags; returns a function (input, teacher, output) that makes the table and returns it as text."""
  scale = flags.DEFINE_enum("scale", "small", ["small", "full"], "table 3: with 3 million parameters, or its commands.")
  workdir = flags.DEFINE_string("workdir", None, "table 3: directory of all runs.")
  rows = flags.DEFINE_list("rows", None, f"table 3: rows in order of worth. Default: {', '.join(table_3.ROWS)}.")
  hours = flags.DEFINE_float("cpu_hours", 24.0, "table 3: no run begins after so many hours of processor time.", 0)
  sizes = flags.DEFINE_string("size", "", _SIZES)

  def run(input: str | None, teacher: str | None, output: str | None) -> str:
    chosen = rows.value or [row for row, what in table_3.ROWS.items() if not teacher or what.begins == "teacher"]
    if scale.value == "full":
      return full_scale.plan(chosen, teacher=teacher or "models/teacher")
    if not input or not workdir.value:
      raise ValueError("--table=3 trains models: it wants --input, a text, and --workdir. Or --scale=full.")
    size, directory = from_mapping(Size, settings(sizes.value), "--size"), local(workdir.value)
    given, file = local(teacher) if teacher else None, output or directory / "table_3.json"
    return table_3.report(input, directory, size, chosen, file, teacher=given, cpu_hours=hours.value)

  return run
