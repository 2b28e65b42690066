"""Softmax layers become layers of an RNN: `python -m supra_jax.bin.linearize --checkpoint=DIR --output=DIR`."""

from __future__ import annotations

import time
import typing

from absl import flags

from supra_jax.bin import start_flags
from supra_jax.bin.choices import whole_numbers
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.bin.mixer_flag import mixer_of
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.hybrid import costs, table
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Reading
from supra_jax.model.feature_maps import FeatureMapKind
from supra_jax.model.mixers.supra import Decay
from supra_jax.model.registry import layer

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to start from.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist.", required=True)
_START = start_flags.define()
_LAYERS = flags.DEFINE_list("layers", None, "Layers to linearise, e.g. 0,1,-1. Default: all softmax layers.")
_MESH = flags.DEFINE_string("mesh", "", "calibrated, memory: sizes of the mesh of devices, as in train.")
flags.DEFINE_enum("feature_map", "dense", typing.get_args(FeatureMapKind), "Shape of W in phi(x) = relu(W x + b).")
_DECAY = flags.DEFINE_enum("decay", "lightning", typing.get_args(Decay), "Decay of the heads.")
_DECAY_START = flags.DEFINE_float("decay_start", None, "First lightning slope. Default: the series' own ratio.")
flags.DEFINE_bool("qk_norm", False, "Normalise phi(q) and phi(k) before RoPE.")

_ROPE_BASE = flags.DEFINE_float(
  "rope_base", None, "Base of RoPE in a model of linear attention. Default: the teacher's."
)


def main() -> None:
  start = _START()
  if _DECAY_START.value is not None and _DECAY.value != "lightning":
    raise ValueError(f"--decay_start does not apply to --decay={_DECAY.value}, but to --decay=lightning.")
  told = {name: flags.FLAGS[name].value for name in start_flags.OF_MIXER}
  asked = flags.FLAGS["mixer"].value
  if asked and (present := [name for name in told if flags.FLAGS[name].present]):
    raise ValueError(f"--{present[0]} beside --mixer: say it as a field of the mixer, as in {asked}:decay=none.")
  mixer = None if start.own_mixer else mixer_of(asked) if asked else layer("supra", **told)
  how: dict[str, typing.Any] = {"mixer": mixer, "layers": whole_numbers(_LAYERS), "mesh": _MESH.value}
  how["rope_base"], began = _ROPE_BASE.value, time.monotonic()
  with shown(enabled=isinstance(start, Reading)) as how["progress"]:
    made = linearize_checkpoint(_CHECKPOINT.value, _OUTPUT.value, start, **how)
  if isinstance(start, Reading):
    own = "" if flags.FLAGS["calibration_data"].present else "; --calibration_data reads text of your own"
    print(f"Read {made.report['calibrated_on']:,} tokens of {start.data}{own}. {time.monotonic() - began:.0f} seconds.")
  if "kept_softmax" in made.report:
    print(table(made.report["kept_softmax"]))
  print(f"{_OUTPUT.value}: {costs(made.config)}.")


if __name__ == "__main__":
  run(with_implementation(main))
