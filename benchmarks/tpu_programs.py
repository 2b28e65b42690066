"""Compiles the TPU kernels to machine code for TPUs that are not here, and reports the memory that they need.

    pip install libtpu
    python -m benchmarks.tpu_programs [--topologies=v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2,tpu7x:2x2x1] [--markdown=FILE]

A row of the table is one device and shape: forward and gradient with segments and lengths, in bfloat16 and float32,
compiled ahead of time by libtpu, for operands [B, T, heads * width] as projections produce them. "Temporaries" are the
bytes that the program needs beyond operands and results, by the compiler's own analysis. A kernel that needs more
on-chip memory than the TPU has fails to compile.
"""

from __future__ import annotations

import os
from pathlib import Path

# Set before jax is imported, which reads them: libtpu must not search for a TPU.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas import linear_attention

_TOPOLOGIES = flags.DEFINE_list(
  "topologies", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"], "TPU topologies to compile for."
)
_MARKDOWN = flags.DEFINE_string("markdown", "", "File to write the table to, besides printing it.")

# (batch, tokens, heads, groups, width): aligned and unaligned sizes; one to eight heads per key/value head.
SHAPES = (
  (1, 2048, 8, 8, 128),
  (1, 2000, 9, 3, 64),
  (2, 300, 8, 2, 64),
  (1, 5, 6, 2, 32),
  (1, 1000, 4, 4, 256),
  (1, 64, 8, 1, 80),
)


def compile_for(topology: str, dtype, shape: tuple[int, ...]):
  """Compiles forward and gradient for the first device of a topology.

  Args:
    topology: name of the topology.
    dtype: dtype of q, k, v and the output.
    shape: (batch, tokens, heads, groups, width).
  """
  devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[:1]
  sharding = NamedSharding(Mesh(devices, ("x",)), PartitionSpec())
  batch, tokens, heads, groups, width = shape

  def operand(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def gradients(q, k, v, segment_ids, lengths, d_output):
    def op(q, k, v):
      options = {"segment_ids": segment_ids, "lengths": lengths, "implementation": "tpu"}
      q, k, v = (x.reshape(batch, tokens, -1, width) for x in (q, k, v))
      output, _ = linear_attention(q, k, v, jnp.full(heads, 0.1), scale=0.1, **options)
      return output.reshape(batch, tokens, -1)

    output, pullback = jax.vjp(op, q, k, v)
    return output, pullback(d_output)

  q, k = operand(batch, tokens, heads * width), operand(batch, tokens, groups * width)
  options = operand(batch, tokens, dtype=jnp.int32), operand(batch, dtype=jnp.int32)
  device = AbstractDevice(devices[0].device_kind, num_cores=1, platform="tpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(gradients).trace(q, k, k, *options, q).lower(lowering_platforms=("tpu",)).compile()


def main(argv: list[str]) -> None:
  del argv
  rows = ["| TPU | B, T, H, G, D | temporaries, bfloat16 | float32 | of the operands |", "| --- " * 5 + "|"]
  print(*rows, sep="\n")
  for topology in _TOPOLOGIES.value:
    for shape in SHAPES:
      analyses = [compile_for(topology, dtype, shape).memory_analysis() for dtype in (jnp.bfloat16, jnp.float32)]
      kilobytes = [f"{analysis.temp_size_in_bytes / 1024:,.0f} KB" for analysis in analyses]
      share = max(analysis.temp_size_in_bytes / analysis.argument_size_in_bytes for analysis in analyses)
      rows.append(f"| {topology} | {', '.join(map(str, shape))} | {kilobytes[0]} | {kilobytes[1]} | {share:.2f}x |")
      print(rows[-1], flush=True)
  if _MARKDOWN.value:
    Path(_MARKDOWN.value).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
  app.run(main)
