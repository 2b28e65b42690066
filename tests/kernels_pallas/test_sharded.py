"""The op on a mesh of eight devices: rows, heads and time cut, in a process that has them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import runs
from kernels_pallas import context_parallel, linear_attention

ROOT = Path(__file__).parents[2]
ALL = ("initial_state", "segment_ids", "lengths")
# Name -> mesh, implementation, tokens, groups of keys and values, options.
CASES = {
  "rows and heads": ((2, 1, 2), "chunked_xla", 96, (2, 6), ALL),
  "time": ((1, 8, 1), "chunked_xla", 96, (3, 3), ()),
  "time, all": ((1, 8, 1), "chunked_xla", 96, (2, 6), ALL),
  "a token each": ((1, 8, 1), "chunked_xla", 8, (6, 6), ("segment_ids", "lengths")),
  "cube": ((2, 2, 2), "chunked_xla", 100, (2, 2), ("initial_state",)),
  "cube, all": ((2, 2, 2), "chunked_xla", 100, (2, 6), ALL),
  "triton": ((2, 2, 2), "triton", 40, (2, 2), ALL),
  "tpu": ((2, 2, 2), "tpu", 40, (2, 2), ALL),
}
INSIDE = """
import functools, json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from kernels_pallas import context_parallel, linear_attention
from tests.kernels_pallas import truth

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
SPECS = {"q": P("rows", "time", "heads"), "slopes": P("heads"), "initial_state": P("rows", "heads"),
         "segment_ids": P("rows", "time"), "lengths": P("rows")}
SPECS |= {"k": SPECS["q"], "v": SPECS["q"]}

def sharded(mesh, implementation, q, k, v, slopes, *, scale, **options):
  op = functools.partial(linear_attention, implementation=implementation)
  if mesh.shape["time"] > 1:
    op = functools.partial(context_parallel.linear_attention, axis="time", implementation=implementation)
  given = {"q": q, "k": k, "v": v, "slopes": slopes} | {n: x for n, x in options.items() if x is not None}
  run = jax.shard_map(lambda given: op(**given, scale=scale), mesh=mesh, in_specs=({n: SPECS[n] for n in given},),
                      out_specs=(SPECS["q"], SPECS["initial_state"]), check_vma=False)
  return run(given)

for name, (sizes, implementation, tokens, groups, given) in json.loads(sys.argv[1]).items():
  mesh = jax.make_mesh(tuple(sizes), ("rows", "time", "heads"), axis_types=(AxisType.Auto,) * 3)
  case = truth.make_case(tokens, *groups, given)
  actual, expected = truth.run(functools.partial(sharded, mesh, implementation), case), truth.by_loop(case)
  errors = {what: truth.relative_error(actual[what], expected[what]) for what in expected}
  put = lambda n, x: jax.device_put(x, jax.sharding.NamedSharding(mesh, SPECS[n]))
  given = {n: put(n, jnp.asarray(x)) for n, x in case.items()}
  forward = jax.jit(lambda given: sharded(mesh, implementation, **given, scale=0.3))
  text = forward.lower(given).compile().as_text()
  kinds = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\\(", text)
  print(json.dumps([name, errors, kinds]))
"""


@pytest.fixture(scope="module")
def done():
  environment = os.environ | runs.devices_environment(8)
  command = [sys.executable, "-c", INSIDE, json.dumps(CASES)]
  ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  return {name: (errors, kinds) for name, errors, kinds in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.compat
@pytest.mark.parametrize("name", CASES)
def test_is_the_op_on_one_device(name, done):
  errors, _ = done[name]
  assert {"output", "state", "d_q", "d_k", "d_v"} <= errors.keys()
  assert {what: error for what, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("name", CASES)
def test_states_are_all_that_travels(name, done):
  (_, time, _), _, _, _, given = CASES[name]
  # One of the states, and two small ones of document ids.
  wanted = 0 if time == 1 else 3 if "segment_ids" in given else 1
  assert done[name][1] == ["all-gather"] * wanted


def test_a_state_beyond_float16_reaches_the_output():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.uniform(1e-3, 2e-3, (1, 4, 2, 3)), jnp.float16) for _ in range(3))
  given = {"scale": 1.0, "initial_state": jnp.full((1, 2, 3, 3), 1e5), "implementation": "chunked_xla"}
  op = functools.partial(context_parallel.linear_attention, axis="time", slopes=jnp.full(2, 0.5), **given)
  mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
  specs = {"in_specs": P(None, "time"), "out_specs": (P(None, "time"), P()), "check_vma": False}
  out, _ = jax.shard_map(op, mesh=mesh, **specs)(q, k, v)
  want, _ = linear_attention(q, k, v, jnp.full(2, 0.5), **given)
  np.testing.assert_allclose(out, want, rtol=2e-3)
  assert float(want.max()) > 100
  with pytest.raises(ValueError, match=r"initial_state has shape \(1, 2, 3\), wanted \[B, H, K, V\] = \(1, 2, 3, 3\)"):
    jax.shard_map(functools.partial(op, initial_state=jnp.zeros((1, 2, 3))), mesh=mesh, **specs)(q, k, v)
