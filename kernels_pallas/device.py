"""Properties of the GPU that a program is traced for."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental.pallas import triton as plgpu


class Gpu(NamedTuple):
  """Properties of a GPU by which kernels are chosen.

  Attributes:
    capability: compute capability, times ten (80, NVIDIA's 8.0, is Ampere; 90 is Hopper).
    multiprocessors: number of streaming multiprocessors.
  """

  capability: int
  multiprocessors: int


_H100 = Gpu(90, 132)  # assumed if there is no GPU
_assumed = _H100


@contextlib.contextmanager
def assuming(gpu: Gpu) -> Iterator[None]:
  """While it lasts, `gpu` returns this one where there is no GPU, so that interpreted kernels are cut as for it."""
  global _assumed
  before, _assumed = _assumed, gpu
  try:
    yield
  finally:
    _assumed = before


def gpu() -> Gpu:
  """Returns the GPU of the abstract mesh if one is set (to compile for another machine), else this process' first GPU.

  Without either, an H100 is assumed, or what `assuming` says.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None and abstract.platform == "gpu" and hasattr(plgpu, "get_gpu_info"):
    with contextlib.suppress(ValueError):  # a card that jax's table does not have, such as a V100
      return Gpu(plgpu.get_gpu_info().compute_capability, abstract.num_cores or _H100.multiprocessors)
  try:
    device = jax.local_devices(backend="cuda")[0]
  except RuntimeError:  # this process has no GPU
    return _assumed
  return Gpu(round(10 * float(device.compute_capability)), device.core_count)
