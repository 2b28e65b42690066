"""The device mesh: its axes, the array dimensions that each axis shards, sharding constraints, and batches on a mesh.

Mesh axes, outermost first, and what each axis shards:
  data    the rows of a batch; parameters are replicated
  fsdp    the rows of a batch and every parameter (fully sharded data parallelism)
  context the tokens of each row; parameters are replicated
  tensor  heads, ffn and vocabulary (tensor parallelism, as in Megatron)

Training runs under `jax.set_mesh(make_mesh(...))`, on a single device too. Outside a mesh, constraints do nothing.

Inference over several devices runs under a `decoding_mesh`, where the axis `weights` has the place of `fsdp`: it shards
parameters as `fsdp` does, but no rows. A decoding step would move all parameters to shard its rows; with whole rows it
moves activations, which are small.
"""

from __future__ import annotations

import contextlib
import functools
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
WEIGHTS_AXIS = "weights"

# Name of an array dimension -> the axes that shard it, if the mesh has them. `gathered` is the dimension `embed` of a
# parameter that training gathers before it is used.
DIMENSIONS: dict[str | None, tuple[str, ...]] = {
  "batch": BATCH_AXES,
  "time": (TIME_AXIS,),
  "embed": ("fsdp", WEIGHTS_AXIS),
  "gathered": (WEIGHTS_AXIS,),
  "heads": ("tensor",),
  "ffn": ("tensor",),
  "vocabulary": ("tensor",),
  None: (),
}


def mesh_sizes(text: str, axes: Sequence[str] = AXES) -> dict[str, int]:
  """Parses the sizes of mesh axes: `fsdp:4,tensor:2` -> {"fsdp": 4, "tensor": 2}; `axes` are those that there are.

  Raises:
    ValueError: an axis is unknown or named twice, or its size is not a positive integer.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.strip().partition(":")
    if name not in axes or name in sizes or not size.isdigit() or int(size) < 1:
      raise ValueError(f"mesh={text!r}: wanted some of {', '.join(axes)}, each once and with a size: fsdp:4,tensor:2.")
    sizes[name] = int(size)
  return sizes


def parse_mesh(text: str, devices: int) -> dict[str, int]:
  """Returns the sizes of all mesh axes: `fsdp:4,tensor:2` -> {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}.

  Args:
    text: sizes as `mesh_sizes` parses them; axes not named have size 1. An empty text puts all devices on `fsdp`.
    devices: number of devices.

  Raises:
    ValueError: `mesh_sizes` rejects `text`, or the product of the sizes is not `devices`.
  """
  sizes = mesh_sizes(text or f"fsdp:{devices}")
  if math.prod(sizes.values()) != devices:
    raise ValueError(f"mesh={text!r} is for {math.prod(sizes.values())} devices; there are {devices}.")
  return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a device mesh with the axis sizes that `parse_mesh` returns.

  Args:
    text: sizes of axes; empty puts all devices on `fsdp`.
    devices: the devices of the mesh; None means all devices of all processes.

  Raises:
    ValueError: `parse_mesh` rejects `text` for that number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(text, len(devices))
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def decoding_mesh(text: str) -> Mesh:
  """Returns a mesh for inference, of the first devices of this process.

  Args:
    text: sizes of axes as `mesh_sizes` parses them, without `context`. `fsdp` gives the axis `weights` its size.

  Raises:
    ValueError: `mesh_sizes` rejects `text`, or there are too few devices.
  """
  sizes = mesh_sizes(text, [axis for axis in AXES if axis != TIME_AXIS])  # which shards the rows of training
  shape = sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1)
  devices = jax.local_devices()
  if math.prod(shape) > len(devices):
    raise ValueError(f"mesh={text!r} is for {math.prod(shape)} devices; there are {len(devices)}.")
  axes = ("data", WEIGHTS_AXIS, "tensor")
  devices = devices[: math.prod(shape)]
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Returns a context in which programs run on a mesh; None: on one device, as outside."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_heads(num_heads: int, num_kv_heads: int, mesh: Mesh) -> None:
  """Checks that the mesh axis `tensor` can shard the heads.

  Raises:
    ValueError: the size of `tensor` does not divide both the number of query heads and that of key/value heads.
  """
  size = mesh.shape["tensor"]
  if num_heads % size or num_kv_heads % size:
    raise ValueError(
      f"tensor:{size} does not divide {num_heads} heads and {num_kv_heads} key/value heads. Choose another mesh."
    )


def dimensions_spec(
  *dimensions: str | None, mesh: Mesh | jax.sharding.AbstractMesh, rows: int | None = None
) -> PartitionSpec:
  """Returns the PartitionSpec of an array.

  Args:
    *dimensions: the name in DIMENSIONS of each of the array's dimensions.
    mesh: the mesh.
    rows: size of the dimension `batch`, which is not sharded if the mesh does not divide it; None: the mesh does.
  """
  whole_rows = rows is not None and rows % batch_shards(mesh)

  def axes(name: str | None) -> str | tuple[str, ...] | None:
    found = tuple(axis for axis in DIMENSIONS[name] if axis in mesh.axis_names)
    return None if not found or (name == "batch" and whole_rows) else found if len(found) > 1 else found[0]

  return PartitionSpec(*map(axes, dimensions))


def _alone(mesh: jax.sharding.AbstractMesh) -> bool:
  return mesh.empty or mesh.size == 1


def _rows(dimensions: Sequence[str | None], x: jax.Array) -> int | None:
  return x.shape[dimensions.index("batch")] if "batch" in dimensions else None


def constrain(x: jax.Array, *dimensions: str | None) -> jax.Array:
  """Constrains the sharding of `x` inside a program; returns `x` unchanged on one device or outside a mesh.

  Args:
    x: an array.
    *dimensions: the name in DIMENSIONS of each dimension of `x`; None: not sharded.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _alone(mesh):
    return x
  if mesh.manual_axes:  # inside `sum_over_tokens`, where an array holds only the rows and tokens of one device
    dimensions = tuple(None if name in ("batch", "time") else name for name in dimensions)
  return jax.lax.with_sharding_constraint(x, dimensions_spec(*dimensions, mesh=mesh, rows=_rows(dimensions, x)))


def sum_over_tokens(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """Makes each device run `function` on its own tokens of a batch; adds the sums over the devices once, at the end.

  With `function` alone, XLA would add over the devices at every sum over tokens: in a loop, in each iteration.

  Args:
    function: (whole, *arrays [rows, time, ...]) -> (sums over the tokens, arrays [rows, time, ...]). All are pytrees;
      `whole` is replicated.

  Returns:
    A function with the signature of `function`; `function` itself where the mesh shards neither rows nor tokens.
  """
  if current_batch_shards() == current_time_shards() == 1:
    return function
  axes = tuple(axis for axis in (*BATCH_AXES, TIME_AXIS) if axis in jax.sharding.get_abstract_mesh().axis_names)

  def on_own_tokens(whole: Any, *arrays: Any) -> tuple[Any, Any]:
    sums, own = function(whole, *arrays)
    return jax.lax.psum(sums, axes), own

  def run(whole: Any, *arrays: Any) -> tuple[Any, Any]:
    tokens = dimensions_spec("batch", "time", mesh=jax.sharding.get_abstract_mesh())
    in_specs = (PartitionSpec(), *(tokens for _ in arrays))
    mapped = jax.shard_map(
      on_own_tokens, in_specs=in_specs, out_specs=(PartitionSpec(), tokens), axis_names=set(axes), check_vma=False
    )
    return mapped(whole, *arrays)

  return run


def per_device(function: Callable[..., Any], in_dimensions: Any, out_dimensions: Any) -> Callable[..., Any]:
  """Makes each device run `function` on its own shards (`jax.shard_map`).

  Args:
    function: takes positional arrays, any of which may be None, and returns a tuple of arrays.
    in_dimensions: for each argument, the names in DIMENSIONS of its dimensions.
    out_dimensions: for each result, the names in DIMENSIONS of its dimensions.

  Returns:
    A function with the signature of `function`; on one device or outside a mesh, `function` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _alone(mesh):
    return function

  def run(*args):
    given = [arg is not None for arg in args]
    held = [(names, arg) for names, arg in zip(in_dimensions, args, strict=True) if arg is not None]
    rows = next((_rows(names, arg) for names, arg in held if "batch" in names), None)
    spec = functools.partial(dimensions_spec, mesh=mesh, rows=rows)
    in_specs = tuple(spec(*names) for names, _ in held)

    def shard(*some):
      left = iter(some)
      return function(*(next(left) if is_given else None for is_given in given))

    out_specs = tuple(spec(*names) for names in out_dimensions)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*(arg for arg in args if arg is not None))

  return run


def batch_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns the number of shards that a mesh cuts the rows of a batch into: size of `data` times size of `fsdp`."""
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def current_batch_shards() -> int:
  """Returns the number of shards that the current mesh cuts the rows of a batch into; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else batch_shards(mesh)


def current_time_shards() -> int:
  """Returns the number of shards that the current mesh cuts the tokens of each row into; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape.get(TIME_AXIS, 1)


def least_tokens() -> jax.Array:
  """Returns the smallest token batch that the current mesh can shard, zeros int32 [B, T], to trace parameter shapes."""
  return jnp.zeros((current_batch_shards(), current_time_shards()), jnp.int32)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Returns the sharding of arrays [..., rows, ...] whose axis of rows comes after `leading` other axes."""
  return NamedSharding(mesh, PartitionSpec(*([None] * leading), BATCH_AXES))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
  """Returns a global batch on the mesh, assembled from the rows that each process has read.

  Args:
    batch: name -> array [R, ...], the rows of this process; R is a multiple of `microbatches`.
    mesh: the device mesh.
    microbatches: number of equal parts that the batch is cut into.

  Returns:
    name -> global array [microbatches, rows, ...], sharded along its rows; `rows` counts those of all processes.

  Raises:
    ValueError: `process_shard` rejects the mesh.
  """
  sharding, (_, count) = batch_sharding(mesh, leading=1), process_shard(mesh)

  def put(local):
    local = local.reshape(microbatches, -1, *local.shape[1:])
    shape = (microbatches, local.shape[1] * count, *local.shape[2:])
    return jax.make_array_from_process_local_data(sharding, local, shape)

  return {name: put(local) for name, local in batch.items()}


def process_shard(mesh: Mesh) -> tuple[int, int]:
  """Returns (index, count): this process reads part `index` of the `count` equal parts of each batch.

  Processes whose devices hold the same rows have the same index.

  Raises:
    ValueError: the rows of two processes overlap without being the same, so that no equal parts serve all devices.
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
