"""Softmax layers become layers of an RNN: `python -m supra_jax.bin.linearize --checkpoint=DIR --output=DIR`."""

from __future__ import annotations

import typing

from absl import flags

from supra_jax.bin.choices import given, whole_numbers
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.hybrid import costs, table
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import MEASURED_TOKENS, STARTS, Calibrated, Window
from supra_jax.model.feature_maps import FeatureMapKind
from supra_jax.model.mixers.supra import Decay
from supra_jax.model.registry import layer

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to start from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist.", required=True)
_METHOD_HELP = (
  "How the layers begin. window: softmax attention over the last tokens, with linear attention that trains beside it. "
  "The others: linear attention alone. calibrated: solved on a text; identity: phi(x) = relu(x); random: the paper's."
)
_METHOD = flags.DEFINE_enum("method", "window", list(STARTS), _METHOD_HELP)
_LAYERS = flags.DEFINE_list("layers", None, "Layers to linearise, e.g. 0,1,-1. Default: all softmax layers.")
_MESH = flags.DEFINE_string("mesh", "", "calibrated: sizes of the mesh of devices, as in train.")
flags.DEFINE_integer("window", Window.window, "window: softmax attention sees so many last tokens.", lower_bound=1)
flags.DEFINE_integer("sinks", Window.sinks, "window: softmax attention sees so many first tokens too.", lower_bound=0)
flags.DEFINE_string("calibration_data", Calibrated.data, "calibrated: text, or directories that prepare_data packed.")
flags.DEFINE_integer("calibration_tokens", Calibrated.tokens, "calibrated: tokens to read of the text.", lower_bound=1)
flags.DEFINE_bool("calibrate_mlp", True, "calibrated: solve for the MLPs' last projections too.")
flags.DEFINE_string("text_key", "text", "calibrated: key of a JSON line, or column, that holds the text.")
flags.DEFINE_integer("keep_softmax", None, "calibrated: number of layers to leave as they are, chosen by KL.")
flags.DEFINE_integer("measured_tokens", MEASURED_TOKENS, "calibrated: tokens for keep_softmax's KL.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "random: of the new weights. calibrated: of the order of packed rows.")
flags.DEFINE_enum("feature_map", "dense", typing.get_args(FeatureMapKind), "Shape of W in phi(x) = relu(W x + b).")
_DECAY = flags.DEFINE_enum("decay", "lightning", typing.get_args(Decay), "Decay of the heads.")
_DECAY_START = flags.DEFINE_float("decay_start", None, "First lightning slope. Default: the series' own ratio.")
flags.DEFINE_bool("qk_norm", False, "Normalise phi(q) and phi(k) before RoPE.")
_OF_MIXER = ("feature_map", "decay", "decay_start", "qk_norm")
_FIELDS = {"calibration_data": "data", "calibration_tokens": "tokens", "calibrate_mlp": "mlp"}


def main() -> None:
  start = given(STARTS, _METHOD, _FIELDS, {"calibrated": [_MESH.name]}, {"measured_tokens": "keep_softmax"})
  if _DECAY_START.value is not None and _DECAY.value != "lightning":
    raise ValueError(f"--decay_start does not apply to --decay={_DECAY.value}, but to --decay=lightning.")
  supra = layer("supra", **{name: flags.FLAGS[name].value for name in _OF_MIXER})
  how: dict[str, typing.Any] = {"mixer": supra, "layers": whole_numbers(_LAYERS), "mesh": _MESH.value}
  with shown(enabled=isinstance(start, Calibrated)) as how["progress"]:
    made = linearize_checkpoint(_CHECKPOINT.value, _OUTPUT.value, start, **how)
  if "kept_softmax" in made.report:
    print(table(made.report["kept_softmax"]))
  print(f"{_OUTPUT.value}: {costs(made.config)}.")


if __name__ == "__main__":
  run(with_implementation(main))
