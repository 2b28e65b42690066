"""Kernels that are compiled on their own platform and interpreted on a CPU, from one traced program.

`jax.lax.platform_dependent` alone is not enough: if a program is exported for several platforms, each branch is lowered
for each platform, and a `pallas_call` for a GPU cannot be lowered for a CPU. In this module a kernel is a JAX primitive
with one lowering per platform. The kernel is traced only when it is lowered, so programs for a CPU do not pay for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_kernel_p = Primitive("supra_kernel")
_kernel_p.multiple_results = True


def run(
  platform: str, kernel: Callable[..., Any], operands: dict[str, jax.Array], results: dict[str, Any]
) -> dict[str, jax.Array]:
  """Runs `kernel(operands, interpret=False)` on `platform`, or `kernel(operands, interpret=True)` on a CPU.

  Args:
    platform: the kernel's platform, "cuda" or "tpu".
    kernel: hashable function of named operands that returns named results. Kernels that compare equal must compute the
      same.
    operands: name -> array.
    results: name -> object with the shape and dtype of a result.

  Returns:
    Name -> array of each result.

  Raises:
    NotImplementedError: when the program is lowered for one platform alone, which is neither `platform` nor a CPU.
  """
  names, shapes = tuple(operands), tuple((name, x.shape, x.dtype) for name, x in results.items())
  outputs = _kernel_p.bind(*operands.values(), platform=platform, kernel=kernel, names=names, shapes=shapes)
  return dict(zip(results, outputs, strict=True))


@_kernel_p.def_abstract_eval
def _shapes(*operands, platform, kernel, names, shapes):
  del operands, platform, kernel, names
  return [jax.core.ShapedArray(shape, dtype) for _, shape, dtype in shapes]


def _call(*operands, kernel, names, shapes, interpret):
  results = kernel(dict(zip(names, operands, strict=True)), interpret=interpret)
  return [results[name] for name, *_ in shapes]


def _lowering(here: str | None):
  def lower(context, *operands, platform, **params):
    platforms = context.module_context.platforms
    # In a program for several platforms, no error: the branch with this kernel never runs on the other platforms.
    if here not in (platform, "cpu") and len(platforms) == 1:
      raise NotImplementedError(
        f"This implementation of linear_attention has a kernel for {platform} and runs interpreted on a cpu; there is"
        f" none for {platforms[0]}. 'auto' and 'chunked_xla' run on every platform."
      )
    call = functools.partial(_call, interpret=here != platform)
    return mlir.lower_fun(call, multiple_results=True)(context, *operands, **params)

  return lower


for _platform in ("cpu", "cuda", "tpu"):
  mlir.register_lowering(_kernel_p, _lowering(_platform), platform=_platform)
mlir.register_lowering(_kernel_p, _lowering(None))


@_kernel_p.def_impl
def _run_now(*operands, **params):
  return jax.jit(functools.partial(_kernel_p.bind, **params))(*operands)


def _batch(operands, axes, *, platform, kernel, names, shapes):
  size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
  mapped = functools.partial(_map, kernel=kernel, names=names, in_axes=tuple(axes))
  shapes = tuple((name, (size, *shape), dtype) for name, shape, dtype in shapes)
  return _kernel_p.bind(*operands, platform=platform, kernel=mapped, names=names, shapes=shapes), [0] * len(shapes)


def _map(operands, *, kernel, names, in_axes, interpret):
  one = lambda *x: kernel(dict(zip(names, x, strict=True)), interpret=interpret)  # noqa: E731
  return jax.vmap(one, in_axes)(*(operands[name] for name in names))


batching.primitive_batchers[_kernel_p] = _batch
