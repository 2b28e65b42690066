"""Trains the small scale's teacher, for longer curves of `benchmarks.tokens_to_quality` than a real model allows a CPU.

    python -m benchmarks.small_teacher --input=TEXT --workdir=DIR

Its model is in DIR/teacher/checkpoint, the text in DIR/text. The same command resumes a killed benchmark. It prints the
loss of random tokens when they stand in a row for the first time and for the second, which induction heads know.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

import supra_jax
from supra_jax.bin.entry import run
from supra_jax.bin.mixer_flag import settings
from supra_jax.core.schema import from_mapping
from supra_jax.experiments.small_scale import Size, induction, small_scale


def main() -> None:
  scale = small_scale(_INPUT.value, Path(_WORKDIR.value), from_mapping(Size, settings(_SIZE.value), "--size"))
  teacher = scale.teacher()
  first, second = induction(supra_jax.load(teacher))
  print(f"{teacher}: random tokens {first:.2f} nats a token, and {second:.2f} the second time.")


if __name__ == "__main__":
  _INPUT = flags.DEFINE_string("input", None, "Text to train on, as prepare_data takes it.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory that everything is written to.", required=True)
  _SIZE = flags.DEFINE_list("size", [], f"Sizes that differ, as in teacher=2000000: fields of {Size()}.")
  run(main)
