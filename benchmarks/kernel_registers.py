"""Compiles the GPU kernels for GPUs that are not here, and reports registers, spills and shared memory.

    pip install --no-deps jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12    # JAX: jax's version
    python -m benchmarks.kernel_registers [--gpus=h100,a100,a6000] [--markdown=FILE]

XLA compiles forward and gradient ahead of time, with segments, lengths and several parts, which needs the most
registers; `ptxas -v` then counts registers in the PTX that XLA dumps. A row of the table is one form, with the largest
numbers of its kernels. A form that needs more shared memory than the GPU has fails to compile. XLA of jax 0.12 dumps no
PTX: with it, a row of `triton` only says whether any kernel spills. `mosaic_gpu` (for an H100, jax >= 0.11) has a ptxas
report of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DUMP = tempfile.mkdtemp(prefix="kernel_registers_")
_TOOLS = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("nvidia") else None
_CUDA = Path(next(iter(_TOOLS.submodule_search_locations or [""]))) if _TOOLS else None
if _CUDA is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
  sys.exit(__doc__)
_NO_PTX = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) >= (0, 11)
# Set before jax is imported, which reads them. The plugin compiles for a described GPU, without one in this machine.
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={_CUDA} --xla_dump_to={_DUMP}"
  + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true" * _NO_PTX,
  # Make Mosaic GPU dump the ptxas reports of its kernels.
  "MOSAIC_GPU_DUMP_PTXAS": "1",
  "MOSAIC_GPU_DUMP_TO": _DUMP,
  "PATH": f"{_CUDA / 'bin'}{os.pathsep}{os.environ['PATH']}",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec  # noqa: E402

from kernels_pallas import device, linear_attention, mosaic_gpu, triton  # noqa: E402

# Name -> (name that jax gives a GPU of this generation, compute capability times 10, multiprocessors, kilobytes of
# shared memory per multiprocessor, kilobytes of shared memory per block, threads per multiprocessor).
GPUS = {
  "h100": ("NVIDIA H100", 90, 132, 228, 227, 2048),
  "a100": ("NVIDIA A100", 80, 108, 164, 163, 2048),
  "b200": ("NVIDIA B200", 100, 148, 228, 227, 2048),
  "rtx6000": ("NVIDIA RTX PRO 6000", 120, 188, 100, 99, 1536),
  "a6000": ("NVIDIA A10", 86, 84, 100, 99, 1536),
}

_GPUS = flags.DEFINE_list("gpus", ["h100", "a100", "a6000"], "GPUs to compile for, of " + ", ".join(GPUS))
_MARKDOWN = flags.DEFINE_string("markdown", "", "File to write the table to, besides printing it.")


def _describe(gpu: str) -> str:
  """Describes a GPU as XLA's GpuTargetConfigProto, in text format, with the properties that the compiler reads."""
  name, capability, cores, shared_core, shared_block, threads = GPUS[gpu]
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared_core * 1024}
      shared_memory_per_block_optin: {shared_block * 1024} core_count: {cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 2000000000000 l2_cache_size: 40000000 clock_rate_ghz: 1.5 device_memory_size: 80000000000
      cuda_compute_capability {{ major: {capability // 10} minor: {capability % 10} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
  """


def _program(implementation: str, dtype, width: int):
  q, k = jax.ShapeDtypeStruct((1, 2000, 8, width), dtype), jax.ShapeDtypeStruct((1, 2000, 2, width), dtype)
  options = jax.ShapeDtypeStruct((1, 2000), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

  def gradients(q, k, v, segment_ids, lengths, d_output):
    def op(q, k, v):
      options = {"segment_ids": segment_ids, "lengths": lengths, "implementation": implementation}
      return linear_attention(q, k, v, jnp.full(8, 0.1), scale=0.1, **options)[0]

    output, pullback = jax.vjp(op, q, k, v)
    return output, pullback(d_output)

  return gradients, (q, k, k, *options, q)


def compile_for(gpu: str, implementation: str, dtype, width: int) -> None:
  """Compiles forward and gradient; XLA dumps PTX and launch parameters into the dump directory."""
  name, capability, cores, *_ = GPUS[gpu]
  device.gpu = lambda: device.Gpu(capability, cores)
  # The topology is given twice, since jax 0.10 and jax 0.12 read it from different arguments.
  topology = topologies.get_topology_desc(
    "1x1x1", platform="cuda", target_config=_describe(gpu), topology="1x1x1"
  ).devices[:1]
  sharding = NamedSharding(jax.sharding.Mesh(topology, ("x",)), PartitionSpec())
  function, operands = _program(implementation, dtype, width)
  operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
  abstract = AbstractDevice(name, num_cores=cores, platform="gpu")
  for path in Path(_DUMP).iterdir():
    path.unlink()
  jax.clear_caches()
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)
  ):
    jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()


def _spills(gpu: str, dtype, width: int) -> str:
  try:
    compile_for(gpu, "triton", dtype, width)
  except jax.errors.JaxRuntimeError as error:
    if "spill" in str(error):
      return "some"
    raise
  return "0"


def _reported(report: str) -> tuple[int, int]:
  """Parses ptxas's report of a kernel: (registers, spilled bytes)."""
  registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
  assert registers and spilled, report
  return int(registers[1]), int(spilled[1])


def _triton_kernels(gpu: str) -> list[tuple[int, int, int]]:
  """Returns (registers, spilled bytes, kilobytes of shared memory) of each kernel in the dump directory."""
  capability = GPUS[gpu][1]
  architecture = f"sm_{capability}" + "a" * (capability in (90, 100, 120))
  shared = {}
  for path in Path(_DUMP).glob("*thunk_sequence.txt"):
    for name, size in re.findall(r"(linear_attention\w*) grid.*shared_memory: (\d+) bytes", path.read_text()):
      shared[name] = int(size)
  kernels = []
  for path in sorted(Path(_DUMP).glob("*.ptx")):
    for name in re.findall(r"\.entry (linear_attention\w*)", path.read_text()):
      command = [_CUDA / "bin" / "ptxas", "-v", f"-arch={architecture}", path, "-o", os.devnull, f"--entry={name}"]
      report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
      kernels.append((*_reported(report), -(-shared[name] // 1024)))
  return kernels


def rows(gpu: str) -> Iterator[tuple]:
  """Yields the cells of each row of the table for a GPU."""
  for dtype in (jnp.bfloat16, jnp.float32):
    for width in (32, 64, 128, 256):
      form = ", ".join(map(str, triton.choose_form(GPUS[gpu][1], jnp.dtype(dtype), width)))
      if _NO_PTX:
        largest = ["-", _spills(gpu, dtype, width), "-"]
      else:
        compile_for(gpu, "triton", dtype, width)
        largest = [max(numbers) for numbers in zip(*_triton_kernels(gpu), strict=True)]
      yield gpu, "triton", jnp.dtype(dtype).name, width, form, *largest
  if mosaic_gpu.HAS_KERNEL and GPUS[gpu][1] == 90:
    for width in (64, 128, 256):
      compile_for(gpu, "mosaic_gpu", jnp.bfloat16, width)
      reports = [_reported(path.read_text()) for path in Path(_DUMP).glob("*ptxas*")]
      form = f"{mosaic_gpu.choose_workers(width, width)} workers"
      yield gpu, "mosaic_gpu", "bfloat16", width, form, *map(max, zip(*reports, strict=True)), "-"


def main(argv: list[str]) -> None:
  del argv
  lines = [
    "| GPU | implementation | dtype | width | form | registers | spilled bytes | shared KB |",
    "| --- " * 8 + "|",
  ]
  print(*lines, sep="\n")
  for gpu in _GPUS.value:
    for cells in rows(gpu):
      lines.append("| " + " | ".join(map(str, cells)) + " |")
      print(lines[-1], flush=True)
  if _MARKDOWN.value:
    Path(_MARKDOWN.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
  app.run(main)
