"""Where arrays live: the mesh, which axis of a parameter is cut along which axis of the mesh, and constraints inside.

Mesh axes, outermost first:
  data    replicas of the parameters, each with rows of its own
  fsdp    rows of its own too, and a shard of every parameter (fully sharded data parallelism)
  context the same rows and parameters, and some of the tokens of each row
  tensor  heads, ffn and vocabulary (Megatron)

All programs run under `jax.set_mesh(make_mesh(...))`, on one device too. Outside a mesh constraints do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
TIME_AXIS = "context"

# What a dimension holds -> the mesh axes that cut it.
DIMENSIONS: dict[str | None, str | tuple[str, ...] | None] = {
  "batch": BATCH_AXES,
  "time": TIME_AXIS,
  "embed": "fsdp",
  "heads": "tensor",
  "ffn": "tensor",
  "vocabulary": "tensor",
  None: None,
}


def mesh_sizes(text: str) -> dict[str, int]:
  """`fsdp:4,tensor:2` -> {"fsdp": 4, "tensor": 2}.

  Raises:
    ValueError: an axis is unknown, named twice or no positive number.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.strip().partition(":")
    if name not in AXES or name in sizes or not size.isdigit() or int(size) < 1:
      raise ValueError(f"mesh={text!r}: wanted some of {', '.join(AXES)}, each once and with a size: fsdp:4,tensor:2.")
    sizes[name] = int(size)
  return sizes


def parse_mesh(text: str, devices: int) -> dict[str, int]:
  """`fsdp:4,tensor:2` -> {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}; an empty text puts all devices on `fsdp`.

  Raises:
    ValueError: as `mesh_sizes`, or the product is not the number of devices.
  """
  sizes = mesh_sizes(text or f"fsdp:{devices}")
  if math.prod(sizes.values()) != devices:
    raise ValueError(f"mesh={text!r} is for {math.prod(sizes.values())} devices; there are {devices}.")
  return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that `parse_mesh` describes, over all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(text, len(devices))
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_heads(num_heads: int, num_kv_heads: int, mesh: Mesh) -> None:
  """Raises ValueError where `tensor` would cut a head in two."""
  size = mesh.shape["tensor"]
  if num_heads % size or num_kv_heads % size:
    raise ValueError(
      f"tensor:{size} does not divide {num_heads} heads and {num_kv_heads} key/value heads. Choose another mesh."
    )


def dimensions_spec(*dimensions: str | None) -> PartitionSpec:
  """The spec of an array whose dimensions hold these, by name in DIMENSIONS."""
  return PartitionSpec(*(DIMENSIONS[name] for name in dimensions))


def _alone(mesh: jax.sharding.AbstractMesh) -> bool:
  return mesh.empty or mesh.size == 1


def constrain(x: jax.Array, *dimensions: str | None) -> jax.Array:
  """X, cut along the mesh as its dimensions say; x itself where there is one device."""
  mesh = jax.sharding.get_abstract_mesh()
  if _alone(mesh):
    return x
  spec = dimensions_spec(*dimensions)
  if mesh.manual_axes:  # inside `sum_over_tokens`, where each part of a batch is alone with its tokens
    spec = PartitionSpec(
      *(None if name in ("batch", "time") else axes for name, axes in zip(dimensions, spec, strict=True))
    )
  return jax.lax.with_sharding_constraint(x, spec)


def sum_over_tokens(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """`function`, run on each device's own tokens of a batch, its sums added up over the devices at the end.

  Left to itself, the compiler adds up over the devices wherever a sum over tokens is made: in a loop at every turn.

  Args:
    function: (whole, *arrays [rows, time, ...]) -> (sums over the tokens, arrays [rows, time, ...]), all of them trees.
  """
  if current_batch_shards() == current_time_shards() == 1:
    return function
  axes = (*BATCH_AXES, TIME_AXIS)

  def on_own_tokens(whole: Any, *arrays: Any) -> tuple[Any, Any]:
    sums, own = function(whole, *arrays)
    return jax.lax.psum(sums, axes), own

  def run(whole: Any, *arrays: Any) -> tuple[Any, Any]:
    tokens = PartitionSpec(BATCH_AXES, TIME_AXIS)
    in_specs = (PartitionSpec(), *(tokens for _ in arrays))
    mapped = jax.shard_map(
      on_own_tokens, in_specs=in_specs, out_specs=(PartitionSpec(), tokens), axis_names=set(axes), check_vma=False
    )
    return mapped(whole, *arrays)

  return run


def per_device(function: Callable[..., Any], in_dimensions: Any, out_dimensions: Any) -> Callable[..., Any]:
  """`function` run by each device on its own shard; `function` itself where there is one.

  Args:
    function: of positional arrays, any of which may be None.
    in_dimensions: for each argument, the names of its dimensions.
    out_dimensions: the same for each result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _alone(mesh):
    return function

  def run(*args):
    given = [arg is not None for arg in args]
    in_specs = tuple(dimensions_spec(*names) for names, is_given in zip(in_dimensions, given, strict=True) if is_given)

    def shard(*some):
      left = iter(some)
      return function(*(next(left) if is_given else None for is_given in given))

    out_specs = tuple(dimensions_spec(*names) for names in out_dimensions)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*(arg for arg in args if arg is not None))

  return run


def batch_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are cut into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def current_batch_shards() -> int:
  """`batch_shards` of the mesh that is set; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def current_time_shards() -> int:
  """How many parts of each row's tokens there are on the mesh that is set; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[TIME_AXIS]


def least_tokens() -> jax.Array:
  """Zeros, int32 [B, T], the fewest that the mesh that is set can cut: for shapes of parameters, which want some."""
  return jnp.zeros((current_batch_shards(), current_time_shards()), jnp.int32)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Of arrays [*leading axes, rows, ...]."""
  return NamedSharding(mesh, PartitionSpec(*([None] * leading), DIMENSIONS["batch"]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
  """A process's rows [R, ...] of a batch -> arrays [microbatches, rows, ...] over all processes."""
  sharding, (_, count) = batch_sharding(mesh, leading=1), process_shard(mesh)

  def put(local):
    local = local.reshape(microbatches, -1, *local.shape[1:])
    shape = (microbatches, local.shape[1] * count, *local.shape[2:])
    return jax.make_array_from_process_local_data(sharding, local, shape)

  return {name: put(local) for name, local in batch.items()}


def process_shard(mesh: Mesh) -> tuple[int, int]:
  """(index, count): which part of each batch this process reads. Processes that share rows have the same index.

  Raises:
    ValueError: processes share rows in part, so that no even cut gives each what its devices need.
  """
  shards = batch_shards(mesh)
  held: dict[int, set[int]] = {}
  rows = np.arange(shards).reshape(mesh.shape["data"], mesh.shape["fsdp"], 1, 1)
  for device, row in zip(mesh.devices.flat, np.broadcast_to(rows, mesh.devices.shape).flat, strict=True):
    held.setdefault(device.process_index, set()).add(int(row))
  size = len(held[jax.process_index()])
  parts = sorted({tuple(sorted(part)) for part in held.values()})
  if [row for part in parts for row in part] != list(range(shards)) or any(len(part) != size for part in parts):
    raise ValueError(f"The mesh {dict(mesh.shape)} gives processes rows that overlap in part: {parts}.")
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
