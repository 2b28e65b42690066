"""Trains the small scale's teacher, for longer curves of `benchmarks.tokens_to_quality` than a real model allows a CPU.

    python -m benchmarks.small_teacher --input=TEXT --workdir=DIR [--tokens=20000000]

Its model is in DIR/teacher/checkpoint, the text in DIR/text. The same command resumes a killed benchmark.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.experiments.small_scale import small_scale


def main() -> None:
  directory, summary = small_scale(_INPUT.value, Path(_WORKDIR.value)).teacher(_TOKENS.value)
  print(f"{directory}: {summary.nll_after:.3f} nats a token after {summary.tokens_trained:,} tokens.")


if __name__ == "__main__":
  _INPUT = flags.DEFINE_string("input", None, "Text to train on, as prepare_data takes it.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory that everything is written to.", required=True)
  _TOKENS = flags.DEFINE_integer("tokens", 20_000_000, "Tokens to train on.", lower_bound=1)
  run(main)
