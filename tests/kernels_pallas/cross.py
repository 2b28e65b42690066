"""Programs lowered for devices that are not here, and the kernels inside them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

TARGET = "__gpu$xla.gpu.triton"


class Call(NamedTuple):
  """One call of a Triton kernel.

  Attributes:
    operands: shapes of its operands.
    operations: names of the operations inside, in order.
    text: the kernel.
    num_warps, num_stages: as it is to be compiled.
  """

  operands: list[tuple[int, ...]]
  operations: list[str]
  text: str
  num_warps: int
  num_stages: int


def program(op: Callable, dtype, *, width=64, tokens=2048, groups=2, batch=1):
  """(forward, its operands, gradients, their operands) of an op with the signature of `linear_attention`; 8 heads."""
  shape = jax.ShapeDtypeStruct
  q, k = shape((batch, tokens, 8, width), dtype), shape((batch, tokens, groups, width), dtype)
  slopes = jnp.full(8, 0.1)
  options = shape((batch, tokens), jnp.int32), shape((batch,), jnp.int32)

  def forward(q, k, v, segment_ids, lengths):
    return op(q, k, v, slopes, scale=0.1, segment_ids=segment_ids, lengths=lengths)

  def gradients(q, k, v, segment_ids, lengths, d_output):
    (output, _), pullback = jax.vjp(lambda *x: forward(*x, segment_ids, lengths), q, k, v)
    return output, pullback((d_output, jnp.zeros((batch, 8, width, width))))

  return forward, (q, k, k, *options), gradients, (q, k, k, *options, q)


def h100():
  """A context in which programs are traced for an H100."""
  return described("NVIDIA H100", "gpu", 132)


def described(kind: str, platform: str, num_cores: int):
  """A context in which programs are traced for such a device."""
  device = AbstractDevice(kind, num_cores=num_cores, platform=platform)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))


def lower(function, *shapes, platform="cuda"):
  with h100():
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))


def _walk(operation):
  for region in operation.regions:
    for block in region:
      for inner in block:
        yield inner.operation
        yield from _walk(inner.operation)


def custom_calls(lowered, target: str) -> Iterator:
  """Operations that call such a target."""
  for operation in _walk(lowered.compiler_ir("stablehlo").operation):
    if operation.name == "stablehlo.custom_call" and target in str(operation.attributes["call_target_name"]):
      yield operation


def kernels(lowered) -> list[Call]:
  calls = []
  for operation in custom_calls(lowered, TARGET):
    config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
    number = lambda name: ir.IntegerAttr(config[name]).value  # noqa: B023, E731
    with mlir.JaxIrContext() as context:
      context.append_dialect_registry(mlir.upstream_dialects)
      dialect.register_dialect(context)
      context.load_all_available_dialects()
      module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
      names = [inner.name for inner in _walk(module.operation)]
      text = str(module)
    operands = [tuple(ir.RankedTensorType(x.type).shape) for x in operation.operands]
    calls.append(Call(operands, names, text, number("num_warps"), number("num_stages")))
  return calls
