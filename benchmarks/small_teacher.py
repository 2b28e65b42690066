"""Trains the small scale's teacher, for longer curves of `benchmarks.tokens_to_quality` than a real model allows a CPU.

    python -m benchmarks.small_teacher --input=TEXT --workdir=DIR

Its model is in DIR/teacher_text/checkpoint, the text in DIR/text. The same command resumes a killed benchmark. It
prints the held-out loss, and that of random tokens when they stand in a row for the first time and for the second,
which induction heads know.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from absl import flags

import supra_jax
from supra_jax.bin.entry import run
from supra_jax.bin.mixer_flag import settings
from supra_jax.core.plain_json import write_json
from supra_jax.core.run_record import run_record
from supra_jax.core.schema import from_mapping
from supra_jax.experiments.small_scale import Size, induction, small_scale
from supra_jax.training.setup import heldout_nll


def main() -> None:
  scale = small_scale(_INPUT.value, Path(_WORKDIR.value), from_mapping(Size, settings(_SIZE.value), "--size"))
  lm = supra_jax.load(scale.teacher())
  size = scale.size
  nll = heldout_nll(lm.model, lm.params, scale.data.heldout, batch_size=size.rows, max_rows=size.heldout_rows)
  first, second = induction(lm)
  count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
  found = {"parameters": count, "heldout_nll": nll, "random_tokens": first, "the_second_time": second}
  write_json(_OUTPUT.value, {"made_by": run_record(), "size": dataclasses.asdict(size), **found})
  print(
    f"{count:,} parameters, {nll:.3f} nats a token; of random tokens {first:.2f}, and {second:.2f} the second time."
  )


if __name__ == "__main__":
  _INPUT = flags.DEFINE_string("input", None, "Text to train on, as prepare_data takes it.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory that everything is written to.", required=True)
  _SIZE = flags.DEFINE_string("size", "", f"Sizes that differ, as in teacher=2000000: fields of {Size()}.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/small_teacher.json", "JSON file to write.")
  run(main)
