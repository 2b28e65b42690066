"""What kernels ask about the GPU that a program is traced for."""

from typing import NamedTuple

import jax
from jax.experimental.pallas import triton as plgpu


class Gpu(NamedTuple):
  """Compute capability, ten times NVIDIA's number (80 is Ampere, 90 Hopper), and the number of multiprocessors."""

  capability: int
  multiprocessors: int


_UNKNOWN = Gpu(90, 132)  # an H100


def gpu() -> Gpu:
  """The GPU of the abstract mesh if one is set, for programs that are compiled elsewhere; else this process' own."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None and abstract.platform == "gpu" and hasattr(plgpu, "get_gpu_info"):
    return Gpu(plgpu.get_gpu_info().compute_capability, abstract.num_cores or _UNKNOWN.multiprocessors)
  try:
    device = jax.local_devices(backend="cuda")[0]
  except RuntimeError:  # none here
    return _UNKNOWN
  return Gpu(round(10 * float(device.compute_capability)), device.core_count)
