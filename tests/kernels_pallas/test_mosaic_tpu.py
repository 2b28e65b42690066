"""The TPU kernel: which heads go together, what it lowers to for each generation, and what a wrong axis would do."""

import base64
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import by_platform, linear_attention, mosaic_tpu, verdict
from kernels_pallas.api import choose_implementations
from tests.kernels_pallas import cross, truth

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIONAL = ("initial_state", "segment_ids", "lengths")
# As if this kernel had been tried, and found right and fast.
TRIED = tuple(row for row in verdict.CANDIDATES if row.platform == "tpu")
GENERATIONS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
SHAPE = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
  "heads, groups, width, together",
  [(8, 8, 128, 1), (32, 8, 128, 1), (8, 8, 64, 2), (32, 8, 64, 8), (9, 3, 64, 9), (14, 2, 64, 14), (4, 2, 256, 1)],
)
def test_heads_go_together_until_registers_are_full(heads, groups, width, together):
  assert mosaic_tpu._heads_at_once(heads, [(heads, width), (groups, width)]) == together


@pytest.mark.parametrize("heads, groups, widths", [(4, 2, (64, 72)), (8, 2, (128, 40)), (2, 1, (130, 3))])
def test_several_heads_and_padded_widths(heads, groups, widths):
  case = truth.make_case(150, groups, heads, OPTIONAL, heads=heads, key_width=widths[0], value_width=widths[1])
  case["slopes"] = np.float32(2.0) ** -np.arange(heads)

  def op(*args, **options):
    return linear_attention(*args, **options, implementation="tpu")

  truth.assert_close(truth.run(op, case), truth.by_loop(case), 1e-5)


def test_chunks_out_of_order_would_show(monkeypatch):
  # A wrongly parallel axis is no race that is detected: each core's order is one of its own. It shows in the numbers.
  case = truth.make_case(40, 2, 2, (), batch=1, heads=2)
  runs = []

  def run(platform, call, given, results):
    del platform, results
    runs.append((call, given))
    return call(given, interpret=True)

  monkeypatch.setattr(by_platform, "run", run)
  monkeypatch.setattr(mosaic_tpu, "_CHUNK", 8)
  state = jnp.zeros((1, 2, 8, 5))
  operands = (jnp.asarray(case[x]) for x in ("q", "k", "v", "slopes"))
  expected, _ = mosaic_tpu.attend(*operands, state, None, None, scale=truth.SCALE)
  truth.assert_close({"o": expected}, {"o": truth.by_loop(case)["output"]}, 1e-5)
  ((call, given),) = runs

  def simulated(semantics, seed):
    wrong = mosaic_tpu.Call(**{**vars(call), "semantics": semantics})
    return wrong(given, interpret=pltpu.InterpretParams(random_seed=seed))["output"]

  right = call.semantics
  assert right == ("parallel", "parallel", "arbitrary")
  np.testing.assert_array_equal(simulated(right, 0), simulated(right, 1))
  wrong = [simulated(("parallel",) * 3, seed) for seed in range(3)]
  assert any(not np.allclose(x, simulated(right, 0), atol=1e-3) for x in wrong)


def _program(name, dtype, width):
  *_, gradients, operands = cross.program(
    functools.partial(linear_attention, implementation=name), dtype, width=width, tokens=2000
  )
  return gradients, operands


def _kernels(lowered):
  """The Mosaic modules of a lowered program, as bytes."""
  configs = [operation.attributes["backend_config"] for operation in cross.custom_calls(lowered, "tpu_custom_call")]
  configs = [json.loads(str(config).strip('"').replace("\\22", '"')) for config in configs]
  return [base64.b64decode(config["custom_call_config"]["body"]) for config in configs]


@pytest.mark.parametrize("kind", [pytest.param(GENERATIONS[0], marks=pytest.mark.compat), *GENERATIONS[1:]])
def test_lowers_for_every_generation(kind):
  """Each dtype and each width, which with which from one generation to the next in turn."""
  widths = (64, 128) if GENERATIONS.index(kind) % 2 else (128, 64)
  for dtype, width in zip((jnp.bfloat16, jnp.float32), widths, strict=True):
    function, operands = _program("auto", dtype, width)
    with cross.described(kind, "tpu", 1), verdict.using(TRIED):
      lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",))
    kernels = _kernels(lowered)
    assert len(kernels) == 4  # the output, and the gradients of q, k and v
    assert all(b"vector.contraction" in kernel or b"tpu.matmul" in kernel for kernel in kernels)
    assert "stablehlo.while" not in lowered.as_text()


def test_auto_obeys_a_verdict():
  def chosen(tokens=64, width=64, dtype=jnp.bfloat16):
    x = SHAPE((1, tokens, 1, width), dtype)
    with verdict.using(TRIED):
      return dict(choose_implementations("auto", x, x, x)).get("tpu")

  assert chosen() == chosen(width=256) == chosen(dtype=jnp.float32) == "tpu"
  assert chosen(tokens=63) is chosen(width=31) is chosen(width=257) is chosen(dtype=jnp.float64) is None


def test_what_it_cannot_serve_is_refused():
  x = jnp.ones((1, 2, 1, 257))
  with pytest.raises(NotImplementedError, match=r"'tpu' cannot serve q float32\[1, 2, 1, 257\].*widths up to 256"):
    linear_attention(x, x, x, jnp.ones(1), scale=1.0, implementation="tpu")


def test_not_on_a_gpu():
  function, operands = _program("tpu", jnp.float32, 64)
  with pytest.raises(NotImplementedError, match=r"none for cuda\. 'auto'"):
    jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
