"""The flags of programs that run one model: --checkpoint, --dtype, --quantize and --mesh."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

import supra_jax
from supra_jax.bin.entry import DTYPES
from supra_jax.inference.lm import LM

flags.disclaim_key_flags()  # --help of each program lists them as its own
_MESH = (
  "Devices to shard the model over, as in fsdp:8 or data:2,tensor:4: fsdp and tensor shard parameters, data the texts "
  "that decode together. Default: one device."
)


def define(*, unless: str | None = None) -> Callable[[], LM]:
  """Defines the flags, and returns a function that loads the model that they name.

  Args:
    unless: name of a boolean flag; if it is given, no model is wanted.
  """
  checkpoint = flags.DEFINE_string("checkpoint", None, "Model directory.", required=unless is None)
  if unless is not None:
    names = ["checkpoint", unless]
    flags.register_multi_flags_validator(names, lambda told: any(told.values()), f"wanted --checkpoint, or --{unless}.")
  dtype = flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of parameters and computation. Default: as stored.")
  quantize = flags.DEFINE_enum("quantize", None, ["int8"], "int8 keeps all matrices in 8 bits. Default: as --dtype.")
  mesh = flags.DEFINE_string("mesh", None, _MESH)
  return lambda: supra_jax.load(str(checkpoint.value), dtype.value, mesh=mesh.value, quantize=quantize.value)
