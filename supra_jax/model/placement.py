"""How a mesh shards each parameter of a model, and each array of a model's state."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supra_jax.core.sharding import dimensions_spec
from supra_jax.model.config import ModelConfig
from supra_jax.model.int8 import Int8
from supra_jax.model.mixers.base import MixerState
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class, mixer_classes
from supra_jax.model.transformer import DecodeState

# (regex of a parameter's path below its layer, names of the parameter's dimensions), for parameters outside the mixers;
# for those of mixers see `Mixer.AXES`. Biases, gains and adapters, a thousandth of the parameters, are replicated.
_MODEL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  ("mlp/(gate_proj|up_proj)/kernel", ("embed", "ffn")),
  ("mlp/down_proj/kernel", ("ffn", "embed")),
  ("lm_head/kernel", ("embed", "vocabulary")),
  ("embed_tokens/embedding", ("vocabulary", "embed")),
)
_WHOLE = re.compile(r"(.*/)?(weight|bias|lora_[ab])")

_LAYER = re.compile(r"^(layers|run)_\d+/")


def parameter_name(path: Sequence[Any]) -> str:
  """Returns the name of a parameter, "run_0/mlp/up_proj/kernel", given its path (`jax.tree_util`) in nested dicts."""
  return "/".join(key.key for key in path)


def parameter_axes() -> list[tuple[str, tuple[str | None, ...]]]:
  """Returns (regex of a parameter's path below its layer, names of its dimensions) for the model and all mixers."""
  return [*_MODEL_AXES] + [(f"{MIXER}/{name}", axes) for mixer in mixer_classes() for name, axes in mixer.AXES]


def param_specs(params: Any, mesh: Mesh) -> Any:
  """Returns the PartitionSpec of every parameter, in a tree like `params`.

  Args:
    params: a tree of arrays or shapes, with one subtree per layer, or per stack of layers; the leading axis of a stack
      is not sharded.
    mesh: the device mesh.

  Raises:
    ValueError: no regex of `parameter_axes` matches a parameter, or a mesh axis does not divide a dimension.
  """
  known = parameter_axes()

  def spec_of(path: Any, leaf: Any) -> Any:
    if isinstance(leaf, Int8):
      spec: Any = spec_of(path, leaf.values)
      whole = (*spec, *[None] * (leaf.values.ndim - len(spec)))
      outputs = [axis for number, axis in enumerate(whole) if number != leaf.inputs % len(whole)]
      return Int8(spec, cast(Any, PartitionSpec(*outputs)), leaf.inputs)
    name = parameter_name(path)
    stacked = name.startswith("run_")
    short, rank = _LAYER.sub("", name), leaf.ndim - stacked
    if _WHOLE.fullmatch(short):
      return PartitionSpec()
    axes = next((axes for regex, axes in known if len(axes) == rank and re.fullmatch(regex, short)), None)
    if axes is None:
      raise ValueError(
        f"No line says how a mesh cuts the parameter {name} {tuple(leaf.shape)}: its mixer's AXES lack one."
      )
    spec = PartitionSpec(*([None] * stacked), *dimensions_spec(*axes, mesh=mesh))
    _check_cuts(name, leaf.shape, spec, mesh)
    return spec

  return jax.tree_util.tree_map_with_path(spec_of, params, is_leaf=lambda x: isinstance(x, Int8))


def state_shardings(state: DecodeState, config: ModelConfig, mesh: Mesh | jax.sharding.AbstractMesh) -> DecodeState:
  """Returns the sharding of each array of a model's state, in a state like `state`; see `Mixer.STATE_AXES`.

  Raises:
    ValueError: a mesh axis does not divide a dimension.
  """

  def of(*axes: str | None) -> Any:
    return NamedSharding(mesh, dimensions_spec(*axes, mesh=mesh, rows=state.cached.shape[0]))

  def of_layer(held: MixerState, layer: MixerConfig) -> MixerState:
    axes = mixer_class(layer.mixer).STATE_AXES
    made = {name: of(*axes[name]) for name in axes}
    for name, sharding in made.items():
      cuts = f"{name} of the state of {layer.mixer} layers"
      _check_cuts(cuts, getattr(held, name).shape, sharding.spec, mesh, " Or linearize its teacher with this --mesh.")
    return dataclasses.replace(held, **made)

  layers = tuple(of_layer(held, layer) for held, layer in zip(state.layers, config.layers, strict=True))
  return dataclasses.replace(state, layers=layers, cached=of("batch"), position=of("batch"), segment=of("batch"))


def placed(state: DecodeState, config: ModelConfig, mesh: Mesh | None) -> DecodeState:
  """Returns a model's state on a mesh; `state` itself for None."""
  return state if mesh is None else jax.device_put(state, state_shardings(state, config, mesh))


def constrain_state(state: DecodeState, config: ModelConfig) -> DecodeState:
  """Constrains the sharding of a model's state inside a program; returns `state` unchanged outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return state if mesh.empty else jax.lax.with_sharding_constraint(state, state_shardings(state, config, mesh))


def _check_cuts(
  name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | jax.sharding.AbstractMesh, more: str = ""
) -> None:
  for size, axis in zip(shape, spec, strict=False):
    axes = axis if isinstance(axis, tuple) else (axis,) if axis is not None else ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      told = ",".join(f"{axis}:{mesh.shape[axis]}" for axis in axes)
      raise ValueError(
        f"{name} {tuple(shape)}: {told} does not divide {size}. Choose another mesh for this model.{more}"
      )


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of every parameter; for the arguments and the ValueError see `param_specs`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, mesh), is_leaf=_is_spec)


def like_params(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Returns shardings for a tree that holds copies of `params`, such as the moments of an optimizer.

  A leaf has the sharding of a parameter if the leaf's path ends in the parameter's path and both have the same shape.
  Every other leaf, such as a counter or Adafactor's row and column means, is replicated.

  Args:
    tree: a tree of arrays or shapes.
    params: the parameters, as in `param_specs`.
    mesh: the device mesh.

  Raises:
    ValueError: as `param_specs`.
  """
  shardings = {
    tuple(_key(key) for key in path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(param_shardings(params, mesh)), strict=True
    )
  }
  whole = NamedSharding(mesh, PartitionSpec())

  def find(path, leaf):
    names = tuple(_key(key) for key in path)
    for start in range(len(names)):
      shape, sharding = shardings.get(names[start:], (None, whole))
      if shape == leaf.shape:
        return sharding
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def _key(key: Any) -> Any:
  return getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)
