"""Programs lowered for a GPU that is not here, and the kernels inside them."""

from typing import NamedTuple

import jax
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


def h100():
  """A context in which programs are traced for an H100."""
  device = AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
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


def kernels(lowered) -> list[Call]:
  calls = []
  for operation in _walk(lowered.compiler_ir("stablehlo").operation):
    if operation.name != "stablehlo.custom_call" or TARGET not in str(operation.attributes["call_target_name"]):
      continue
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
