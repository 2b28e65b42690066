"""Softmax layers become SUPRA layers: `python -m supra_jax.bin.linearize --checkpoint=DIR --output=DIR`."""

from __future__ import annotations

import dataclasses
import typing

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.config import Decay, FeatureMapKind, SupraConfig, from_mapping
from supra_jax.linearize import linearize_checkpoint

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to start from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist.", required=True)
_LAYERS = flags.DEFINE_list("layers", None, "Layers to linearise, e.g. 0,1,-1. Default: all softmax layers.")
flags.DEFINE_enum("feature_map", "dense", typing.get_args(FeatureMapKind), "W of phi(x) = relu(W x + b).")
flags.DEFINE_enum("decay", "lightning", typing.get_args(Decay), "Decay of the heads.")
flags.DEFINE_float("decay_start", None, "First lightning slope. Default: the series' own ratio.")
flags.DEFINE_bool("qk_norm", False, "Normalise phi(q) and phi(k) before RoPE.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the new weights.")


def main() -> None:
  values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(SupraConfig)}
  supra = from_mapping(SupraConfig, values, "flags")
  layers = None if _LAYERS.value is None else [int(layer) for layer in _LAYERS.value]
  config = linearize_checkpoint(_CHECKPOINT.value, _OUTPUT.value, supra=supra, layers=layers, seed=_SEED.value)
  print(f"{_OUTPUT.value}: {config.mixers.count('supra')} of {config.num_layers} layers are SUPRA layers.")


if __name__ == "__main__":
  run(main)
