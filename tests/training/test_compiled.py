"""Programs whose collectives are known by hand, compiled for eight devices in a process of their own."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import runs
from supra_jax.training import compiled

DEVICES, LAYERS, WIDTH, ROWS = 8, 6, 64, 32
ROOT = Path(__file__).resolve().parents[2]


def nested_scans(x):
  def inner(carry, _):
    return jax.lax.psum(carry, "devices") * 0.5, None

  def outer(carry, _):
    return jax.lax.scan(inner, carry, length=5)[0] + 1, None

  return jax.lax.scan(outer, x, length=3)[0]


def explicit_fsdp(weights, x):
  """The gradient of layers whose weights are gathered, again in the backward pass; gradients are scattered."""

  @jax.checkpoint
  def layer(x, shard):
    return jnp.tanh(x @ jax.lax.all_gather(shard, "devices", tiled=True)), None

  return jax.grad(lambda weights: (jax.lax.scan(layer, x, weights)[0] ** 2).sum())(weights)


def each_kind(x):
  some = jax.lax.psum((x, x[:2] * 3), "devices")
  exchanged = jax.lax.all_to_all(x, "devices", 0, 0, tiled=True)
  passed_on = jax.lax.ppermute(x.astype(jnp.int8), "devices", [(i, (i + 1) % DEVICES) for i in range(DEVICES)])
  return some, exchanged, passed_on, jax.lax.psum_scatter(x * 2, "devices", tiled=True)


def branch(x):
  return jax.lax.cond(x[0] > 0, lambda x: jax.lax.psum(x, "devices"), lambda x: x * 2, x)


def open_loop(x):
  return jax.lax.while_loop(lambda x: x[0] < 9, lambda x: jax.lax.psum(x, "devices"), x)


def main() -> None:
  """Prints {program: [text, memory]}."""
  mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
  whole, split = PartitionSpec(), PartitionSpec("devices")
  middle, floats = PartitionSpec(None, "devices"), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  weights, rows = floats((LAYERS, WIDTH, WIDTH)), floats((ROWS, WIDTH))

  def mapped(function, *in_specs, out=whole):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False))

  def sharded(weights, x):
    # Left to XLA: weights lie in shards, and the product wants them whole.
    whole_weights = NamedSharding(mesh, PartitionSpec(None, None))
    layer = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole_weights)), None)  # noqa: E731
    return jax.lax.scan(layer, x, weights)[0]

  shardings = tuple(NamedSharding(mesh, spec) for spec in (middle, split))
  programs = {
    "nested_scans": mapped(nested_scans, whole).lower(floats((16,))),
    "explicit_fsdp": mapped(explicit_fsdp, middle, split, out=middle).lower(weights, rows),
    "sharded": jax.jit(sharded, in_shardings=shardings, out_shardings=shardings[1]).lower(weights, rows),
    "each_kind": mapped(each_kind, whole, out=split).lower(floats((64, 16))),
    "branch": mapped(branch, whole).lower(floats((16,))),
    "open_loop": mapped(open_loop, whole).lower(floats((16,))),
    "donated": jax.jit(lambda x: x + 1, donate_argnums=0, in_shardings=shardings[1]).lower(rows),
  }
  made = {name: program.compile() for name, program in programs.items()}
  print(json.dumps({name: (p.as_text(), dataclasses.asdict(compiled.memory(p))) for name, p in made.items()}))


@pytest.fixture(scope="module")
def programs():
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.test_compiled"],
    cwd=ROOT,
    env={**os.environ, **runs.devices_environment(DEVICES), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def traffic(count, sizes, exact=True):
  return compiled.Traffic(count, sizes, exact)


WEIGHTS = LAYERS * WIDTH * WIDTH * 4
KNOWN = {
  "nested_scans": {"all-reduce": traffic(3 * 5, {"f32": 3 * 5 * 16 * 4})},
  "explicit_fsdp": {
    "all-gather": traffic(2 * LAYERS, {"f32": 2 * WEIGHTS}),
    "reduce-scatter": traffic(LAYERS, {"f32": WEIGHTS}),
  },
  "sharded": {"all-gather": traffic(LAYERS, {"f32": WEIGHTS})},
  "each_kind": {
    "all-reduce": traffic(1, {"f32": (64 + 2) * 16 * 4}),
    "reduce-scatter": traffic(1, {"f32": 64 * 16 * 4}),
    "all-to-all": traffic(1, {"f32": 64 * 16 * 4}),
    "collective-permute": traffic(1, {"s8": 64 * 16}),
  },
  "branch": {"all-reduce": traffic(1, {"f32": 64}, exact=False)},
  "open_loop": {"all-reduce": traffic(1, {"f32": 64}, exact=False)},
  "donated": {},
}


@pytest.mark.compat
class TestCollectives:
  @pytest.mark.parametrize("name", KNOWN)
  def test_known_by_hand(self, programs, name):
    assert compiled.collectives(programs[name][0]) == KNOWN[name]

  @pytest.mark.parametrize("name", ["nested_scans", "explicit_fsdp"])
  def test_without_trip_counts_of_xla(self, programs, name):
    text, stripped = re.subn(r', backend_config=\{"[^\n]*?known_trip_count[^\n]*', "", programs[name][0])
    assert stripped == 2
    inexact = {kind: dataclasses.replace(known, exact=False) for kind, known in KNOWN[name].items()}
    assert compiled.collectives(text) == inexact

  def test_asynchronous_pairs_count_once(self):
    assert compiled.collectives(ASYNCHRONOUS) == {
      "all-gather": traffic(3, {"bf16": 3 * 64 * 2, "f32": 3 * 32 * 4}),
      "all-reduce": traffic(1, {"bf16": 8 * 2}),
      "reduce-scatter": traffic(2, {"f32": 2 * 64 * 4}),
      "collective-permute": traffic(1, {"pred": 8}),
    }

  def test_total(self):
    assert traffic(1, {"bf16": 3, "f32": 4}).total_bytes == 7

  def test_no_program(self):
    with pytest.raises(ValueError, match=r"No ENTRY computation.*'nothing'"):
      compiled.collectives("nothing")


class TestMemory:
  def test_of_one_device(self, programs):
    # A shard of the weights and of the rows; a shard of the gradient.
    memory = compiled.Memory(**programs["explicit_fsdp"][1])
    rows = ROWS * WIDTH * 4
    assert (memory.arguments, memory.outputs, memory.aliased) == ((WEIGHTS + rows) // 8, WEIGHTS // 8, 0)
    assert memory.temporaries >= WIDTH * WIDTH * 4  # at least one layer is whole
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries

  def test_donated(self, programs):
    memory, shard = compiled.Memory(**programs["donated"][1]), ROWS * WIDTH * 4 // DEVICES
    assert (memory.arguments, memory.outputs, memory.aliased) == (shard, shard, shard)
    assert memory.peak == shard + memory.temporaries

  def test_backend_that_does_not_tell(self):
    class Compiled:
      def memory_analysis(self):
        return None

    assert compiled.memory(Compiled()) is None


# As GPU and TPU backends write it.
ASYNCHRONOUS = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0:T(128)} parameter(0)
  ROOT %reduce-scatter.1 = f32[8]{0:T(128)} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}, execution_thread="async"

%body (s: (s32[], bf16[8], f32[4])) -> (s32[], bf16[8], f32[4]) {
  %s = (s32[]{:T(128)}, bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[8]{0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %y = f32[4]{0} get-tuple-element(%s), index=2
  %gather = ((bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}), (bf16[64]{0:T(8,128)(2,1)}, f32[32]{0})) all-gather-start(%x, %y), replica_groups=[1,8]<=[8], dimensions={0}
  %gathered = (bf16[64]{0:T(8,128)(2,1)}, f32[32]{0}) all-gather-done(%gather)
  ROOT %next = (s32[]{:T(128)}, bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}) tuple(%i, %x, %y), control-predecessors={%add}
}

%condition (t: (s32[], bf16[8], f32[4])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%j, %three), direction=LT
}

ENTRY %main (state: (s32[], bf16[8], f32[4]), z: f32[64], flag: pred[8]) -> f32[8] {
  %state = (s32[]{:T(128)}, bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}) parameter(0)
  %z = f32[64]{0:T(128)} parameter(1)
  %flag = pred[8]{0} parameter(2)
  %loop = (s32[]{:T(128)}, bf16[8]{0:T(8,128)(2,1)S(1)}, f32[4]{0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %w = bf16[8]{0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
  %reduce = bf16[8]{0} all-reduce-start(%w), replica_groups={}, to_apply=%add
  %reduced = bf16[8]{0} all-reduce-done(%reduce)
  %send = (pred[8]{0}, pred[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%flag), source_target_pairs={{0,1},{1,0}}
  %sent = pred[8]{0} collective-permute-done(%send)
  %scatter = ((f32[64]{0:T(128)}), f32[8]{0:T(128)}) reduce-scatter-start(%z), replica_groups={}, dimensions={0}, to_apply=%add
  %scattered = f32[8]{0:T(128)} reduce-scatter-done(%scatter)
  %start = ((f32[64]{0:T(128)}), f32[8]{0:T(128)}, s32[]) async-start(%z), async_execution_thread="async", calls=%wrapped
  ROOT %done = f32[8]{0:T(128)} async-done(%start), async_execution_thread="async", calls=%wrapped
}
"""  # noqa: E501


if __name__ == "__main__":
  main()
