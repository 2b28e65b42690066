"""The parameters of a model as inference keeps them: few products, in a dtype or in 8 bits, on one device or a mesh."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from supra_jax.core.sharding import check_heads
from supra_jax.model.config import ModelConfig
from supra_jax.model.int8 import Int8, in_int8
from supra_jax.model.placement import param_shardings
from supra_jax.model.registry import MIXER, mixer_class
from supra_jax.storage.model_directory import ModelCheckpoint, load_model, load_model_without_params


def load_parameters(
  directory: str | os.PathLike[str], dtype: Any, mesh: Mesh | None, quantize: str | None
) -> ModelCheckpoint:
  """Loads a model directory; parameters that would follow each other without a nonlinearity are multiplied together.

  Args:
    directory: model directory.
    dtype: dtype of the parameters, and with `quantize` of those that are not matrices; None keeps what is stored.
    mesh: the mesh to put the parameters on; None: the first device.
    quantize: "int8", or None. A matrix is read into the host's memory, and gets to the devices in 8 bits.

  Raises:
    FileNotFoundError: as `load_model`.
    ValueError: as `load_model`; `quantize` is unknown; or the mesh does not divide a dimension of a parameter or state.
  """
  if quantize not in (None, "int8"):
    raise ValueError(f"quantize={quantize!r}: wanted 'int8' or None.")
  place = None if mesh is None else functools.partial(param_shardings, mesh=mesh)
  if mesh is not None:
    config = load_model_without_params(directory).config
    check_heads(config.num_heads, config.num_kv_heads, mesh)
  if not quantize:
    stored = load_model(directory, dtype, shardings=place)
    params = for_inference(stored.config, stored.params)
  else:
    stored = load_model(directory, shardings=_on_host)
    params = in_int8(for_inference(stored.config, stored.params), dtype)
  if quantize or place:
    params = jax.device_put(params, place(params) if place else None)
  return dataclasses.replace(stored, params=params)


def for_inference(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a model's parameters, with those of each mixer as `Mixer.for_inference` returns them."""
  params = dict(params)
  for i, layer in enumerate(config.layers):
    block = params[f"layers_{i}"]
    params[f"layers_{i}"] = {**block, MIXER: mixer_class(layer.mixer).for_inference(config, block[MIXER])}
  return params


def _on_host(shapes: Any) -> Any:
  try:
    host = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # jax was told to use no CPU
    host = jax.local_devices()[0]
  return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(host), shapes)


def dtype_of(params: Mapping[str, Any]) -> Any:
  """Returns the dtype that a model with these parameters computes in."""
  embedding = params["embed_tokens"]["embedding"]
  return params["norm"]["weight"].dtype if isinstance(embedding, Int8) else embedding.dtype
