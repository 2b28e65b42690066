"""Softmax layers become SUPRA layers: `python -m supra_jax.bin.linearize --checkpoint=DIR --output=DIR`."""

from __future__ import annotations

import contextlib
import typing

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.core.schema import from_mapping
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.hybrid import MEASURED_TOKENS, costs, table
from supra_jax.linearization.linearize import SINKS, Calibration, linearize_checkpoint
from supra_jax.model.config import Decay, FeatureMapKind, SupraConfig

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to start from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist.", required=True)
_METHOD_HELP = (
  "How it begins. window: the teacher's softmax over the last tokens, with linear attention that trains beside it. "
  "Linear attention alone: calibrated, its projections solved for; identity, phi(x) = relu(x); random, the paper's."
)
_METHOD = flags.DEFINE_enum("method", "window", ["window", "calibrated", "identity", "random"], _METHOD_HELP)
_DATA = flags.DEFINE_string("calibration_data", "pydoc:topics", "Your text, or directories that prepare_data packed.")
_TOKENS = flags.DEFINE_integer("calibration_tokens", 32768, "How many tokens of it are read.", lower_bound=1)
_MLP = flags.DEFINE_bool("calibrate_mlp", True, "Solve for the MLPs' last projections too.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Key of a JSON line, or column, that holds the text.")
_MESH = flags.DEFINE_string("mesh", "", "Of the devices that calibrate, as in train.")
_LAYERS = flags.DEFINE_list("layers", None, "Layers to linearise, e.g. 0,1,-1. Default: all softmax layers.")
_KEEP = flags.DEFINE_integer("keep_softmax", None, "So many of them stay, those that bring it nearest to the teacher.")
_MEASURED = flags.DEFINE_integer("measured_tokens", MEASURED_TOKENS, "Of the text, to find them on.", lower_bound=1)
flags.DEFINE_enum("feature_map", "dense", typing.get_args(FeatureMapKind), "W of phi(x) = relu(W x + b).")
flags.DEFINE_enum("decay", "lightning", typing.get_args(Decay), "Decay of the heads.")
flags.DEFINE_float("decay_start", None, "First lightning slope. Default: the series' own ratio.")
flags.DEFINE_bool("qk_norm", False, "Normalise phi(q) and phi(k) before RoPE.")
_WINDOW = flags.DEFINE_integer("window", SupraConfig.window, "Softmax over so many last tokens.", lower_bound=1)
_SINKS = flags.DEFINE_integer("sinks", SINKS, "And over so many of a text's first tokens.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of new weights, and of the order of the text.")


def main() -> None:
  names = ("feature_map", "decay", "decay_start", "qk_norm")
  supra = from_mapping(SupraConfig, {name: flags.FLAGS[name].value for name in names}, "flags")
  layers = None if _LAYERS.value is None else [int(layer) for layer in _LAYERS.value]
  phi, calibration = "random" if _METHOD.value == "random" else "identity", None
  if _METHOD.value == "calibrated":
    how: dict[str, typing.Any] = {"tokens": _TOKENS.value, "mlp": _MLP.value, "seed": _SEED.value, "mesh": _MESH.value}
    calibration = Calibration(_DATA.value, _TEXT_KEY.value, **how)
  new: dict[str, typing.Any] = {"supra": supra, "layers": layers, "phi": phi, "seed": _SEED.value}
  new |= {"window": _WINDOW.value if _METHOD.value == "window" else None, "sinks": _SINKS.value}
  new |= {"keep_softmax": _KEEP.value, "measured_tokens": _MEASURED.value}
  with shown() if calibration else contextlib.nullcontext() as report:
    config = linearize_checkpoint(_CHECKPOINT.value, _OUTPUT.value, calibration=calibration, report=report, **new)
  if _KEEP.value:
    print(table(_OUTPUT.value))
  print(f"{_OUTPUT.value}: {costs(config)}.")


if __name__ == "__main__":
  run(main)
