"""Uptrains a model: `python -m supra_jax.bin.train --config=configs/FILE.py --workdir=DIR [--config.KEY=VALUE ...]`."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from supra_jax.bin.entry import run
from supra_jax.train import TrainConfig, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; goes on where it stopped.", required=True)
flags.mark_flag_as_required("config")


def main() -> None:
  summary = train(TrainConfig.from_mapping(_CONFIG.value.to_dict()), _WORKDIR.value)
  print(
    f"Held-out loss {summary.nll_before:.4f} -> {summary.nll_after:.4f} nats a token, {summary.tokens_trained} tokens, "
    f"{summary.tokens_per_second:.0f} tokens/s. The model is in {_WORKDIR.value}/checkpoint."
  )


if __name__ == "__main__":
  run(main)
