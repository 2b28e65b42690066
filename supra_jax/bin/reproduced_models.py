"""The flags of `reproduce` for tables 1 and 2 and figure 1, which are asked of models that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from supra_jax.bin.choices import whole_numbers
from supra_jax.core.files import local
from supra_jax.experiments import figure_1
from supra_jax.experiments.gathered import named
from supra_jax.experiments.tables_1_2 import table_1, table_2

flags.disclaim_key_flags()  # --help of each program lists them as its own
_DATA = "table 2: directories of the questions, qasper=DIR and narrativeqa=DIR."
_LENGTHS = "table 2: tokens that prompts are cut to. figure 1: tokens that have been read. Default: the paper's."


def define() -> Callable[[str | None, Sequence[str], str], str]:
  """Defines the flags; returns a function (table, models, output) that makes it, figure 1 for the table None."""
  limit = flags.DEFINE_integer("limit", None, "tables 1 and 2: questions of each task. Default: all.", 1)
  data_dir = flags.DEFINE_string("data_dir", None, "table 1: directory of the tasks' data sets, as in evaluate.")
  trust = flags.DEFINE_bool("trust_remote_code", False, "table 1: whether models of hf: may run code that comes along.")
  data = flags.DEFINE_list("data", [], _DATA)
  lengths = flags.DEFINE_list("lengths", None, _LENGTHS)
  steps = flags.DEFINE_integer("steps", 8, "figure 1: tokens that are decoded at a time.", 1)
  first = flags.DEFINE_string("table_1", None, "figure 1: the JSON file of table 1, whose models are drawn too.")

  def run(table: str | None, models: Sequence[str], output: str) -> str:
    file, cuts = local(output), whole_numbers(lengths)
    some: dict[str, Any] = {} if cuts is None else {"lengths": cuts}
    if table == "1":
      return table_1(models, file, limit=limit.value, data_dir=data_dir.value, trust_remote_code=trust.value)
    if table == "2":
      if not data.value:
        raise ValueError("--table=2 wants --data=qasper=DIR,narrativeqa=DIR, or one of them.")
      return table_2(models, file, data=named(data.value), limit=limit.value, progress=True, **some)
    known = local(first.value) if first.value else None
    return figure_1.figure_1(named(models), file, table_1=known, steps=steps.value, progress=True, **some)

  return run
