"""The Triton kernels: every form, every cut into parts, and what they lower to for an H100, without one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, linear_attention, parts, triton, verdict
from kernels_pallas.api import choose_implementations
from tests.kernels_pallas import cross, truth

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIONAL = ("initial_state", "segment_ids", "lengths")


def _run(monkeypatch, case, count, dtype=jnp.float32, capability=90):
  monkeypatch.setattr(parts, "choose_count", lambda *_: count)
  monkeypatch.setattr(device, "gpu", lambda: device.Gpu(capability, 132))
  return truth.run(truth.direct(triton.attend), case, dtype)


@pytest.mark.parametrize("tokens, count, given", [(257, 1, ()), (100, 3, OPTIONAL), (100, 7, ("lengths",))])
def test_parts_are_the_whole(monkeypatch, tokens, count, given):
  case = truth.make_case(tokens, 2, 3, given)
  truth.assert_close(_run(monkeypatch, case, count), truth.by_loop(case), 1e-5)


# Several key tiles and value blocks, the last of each cut short.
@pytest.mark.parametrize(
  "dtype, capability, widths", [(jnp.float32, 90, (40, 72)), (jnp.bfloat16, 90, (72, 80)), (jnp.bfloat16, 80, (72, 80))]
)
def test_widths_beyond_one_tile(monkeypatch, dtype, capability, widths):
  case = truth.make_case(100, 1, 2, OPTIONAL, heads=2, key_width=widths[0], value_width=widths[1])
  case = truth.rounded(case, dtype)
  actual = _run(monkeypatch, case, 2, dtype, capability)
  truth.assert_close(actual, truth.by_loop(case), 1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("bfloat16", "float32", "float16")])
def test_other_dtypes(monkeypatch, dtypes):
  case = truth.make_case(20, 2, 2, (), batch=1, heads=2)
  q, k, v = (jnp.asarray(case[x], dtype) for x, dtype in zip("qkv", dtypes, strict=True))
  output, state = linear_attention(q, k, v, case["slopes"], scale=0.3, implementation="triton")
  assert output.dtype == v.dtype
  exact = {x: np.asarray(y, np.float32) for x, y in zip("qkv", (q, k, v), strict=True)} | {"slopes": case["slopes"]}
  expected = truth.by_loop(exact)
  truth.assert_close({"output": output, "state": state}, {x: expected[x] for x in ("output", "state")}, 1e-3)


@pytest.mark.parametrize("tokens, chunk, count", [(1, 16, 1), (64, 16, 3), (65, 16, 4), (100, 16, 5), (1000, 64, 7)])
def test_no_part_is_empty(tokens, chunk, count):
  cut = parts.cut(tokens, chunk, count)
  assert cut.num_parts <= count and cut.tokens >= tokens > (cut.num_parts - 1) * cut.num_chunks * cut.chunk


@pytest.mark.parametrize(
  "programs, num_chunks, most, least",
  [(512, 32, 1, 1), (264, 32, 1, 1), (64, 512, 8, 4), (1, 1, 1, 1), (2, 512, 64, 16)],
)
def test_few_programs_on_long_rows_are_cut(programs, num_chunks, most, least):
  assert least <= parts.choose_count(programs, num_chunks, 264) <= most


def test_every_form_is_reached():
  reached = {
    triton.choose_form(capability, jnp.dtype(dtype), width)
    for capability in (80, 86, 89, 90, 100, 120)
    for dtype in (jnp.bfloat16, jnp.float32)
    for width in (1, 64, 65, 128, 129, 256)
  }
  assert reached == {row[-1] for row in triton.FORMS}


SHAPE = jax.ShapeDtypeStruct


def _program(name, dtype, **sizes):
  return cross.program(functools.partial(linear_attention, implementation=name), dtype, **sizes)


PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<(\d+)x(\d+)x(\w+)> -> tensor<(\d+)x(\d+)x(\w+)>")


def _multiplications(call, dtype="bf16"):
  """How many all products of a kernel are; they are of such arrays, and summed in float32."""
  found = PRODUCT.findall(call.text)
  assert len(found) == call.operations.count("tt.dot") > 0
  for rows, inner, left, inner_too, columns, right, *out in found:
    assert (left, right, inner, out) == (dtype, dtype, inner_too, [rows, columns, "f32"])
  return sum(int(rows) * int(inner) * int(columns) for rows, inner, _, _, columns, *_ in found)


@pytest.fixture
def tried():
  """As if all kernels but mosaic_gpu had been tried, and found right and fast."""
  with verdict.using(tuple(row for row in verdict.CANDIDATES if row.implementation != "mosaic_gpu")):
    yield


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("name, width", [pytest.param("auto", 64, marks=pytest.mark.compat), ("triton", 128)])
def test_lowers_for_an_h100(name, width):
  forward, operands, gradients, more = _program(name, jnp.bfloat16, width=width)
  lowered = cross.lower(forward, *operands)
  calls = cross.kernels(lowered)
  # Few heads: parts, so states come first, each the sum of k v. Then that again, q k, what it is multiplied with, and q
  # times the state; a program has a block of 64 values.
  states = 64 * width * 64
  fused = 2 * states + 64 * 64 * width + 64 * 64 * 64
  assert [_multiplications(call) for call in calls] == [states, fused]
  assert all((call.num_warps, call.num_stages) == (4, 2) for call in calls)
  # Keys and values reach the kernels with the heads that they have.
  assert sum(shape == (1, 2048, 2, width) for shape in calls[1].operands) == 2

  lowered = cross.lower(gradients, *more)
  calls = cross.kernels(lowered)
  assert sorted(_multiplications(call) for call in calls) == [states] * 2 + [fused] * 4
  assert all("arith.divf" not in call.operations for call in calls)  # nothing is divided by a power of gamma
  assert "stablehlo.while" not in lowered.as_text()


def test_float32_is_float32_on_an_h100():
  forward, operands, *_ = _program("triton", jnp.float32)
  for precision in ("bfloat16", "highest"):
    with jax.default_matmul_precision(precision):
      calls = cross.kernels(cross.lower(forward, *operands))
    assert calls and all(_multiplications(call, "f32") > 0 for call in calls)
    products = [line for call in calls for line in call.text.splitlines() if PRODUCT.search(line)]
    assert all("inputPrecision = tf32x3 " in line for line in products), products


def test_many_heads_are_not_cut():
  forward, operands, *_ = _program("triton", jnp.bfloat16, batch=64)
  assert [_multiplications(call) for call in cross.kernels(cross.lower(forward, *operands))] == [4 * 64**3]


@pytest.mark.usefixtures("tried")
def test_auto_on_a_cpu_has_no_kernel():
  *_, gradients, operands = _program("auto", jnp.float32, tokens=256)
  auto = cross.lower(gradients, *operands, platform="cpu")
  assert not cross.kernels(auto) and "stablehlo.while" in auto.as_text()
  sizes = [
    jax.jit(gradients).lower(*operands).compile().memory_analysis().temp_size_in_bytes
    for gradients in (_program(name, jnp.float32, tokens=256)[2] for name in ("auto", "chunked_xla"))
  ]
  assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("tried")
def test_auto_is_exported_for_all():
  forward, operands, *_ = _program("auto", jnp.float32, width=16, tokens=64)
  checks = [jax.export.DisabledSafetyCheck.custom_call(cross.TARGET)]
  with cross.h100():
    exported = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"), disabled_checks=checks)(*operands)
  assert cross.TARGET in exported.mlir_module()
  rng = np.random.default_rng(0)
  values = [rng.standard_normal(x.shape).astype(x.dtype) for x in operands[:3]]
  values += [np.zeros((1, 64), np.int32), np.array([50], np.int32)]
  expected = _program("reference", jnp.float32)[0](*values)
  truth.assert_close(dict(enumerate(exported.call(*values))), dict(enumerate(expected)), 1e-5)


def _chosen(monkeypatch, capability=90, tokens=64, width=64, dtype=jnp.bfloat16):
  monkeypatch.setattr(device, "gpu", lambda: device.Gpu(capability, 132))
  x = SHAPE((1, tokens, 1, width), dtype)
  chosen = dict(choose_implementations("auto", x, x, x))
  return {platform: name for platform, name in chosen.items() if platform in ("default", "cuda")}


def test_auto_obeys_a_verdict(monkeypatch, tried):
  kernel, none = {"default": "chunked_xla", "cuda": "triton"}, {"default": "chunked_xla"}
  assert _chosen(monkeypatch) == _chosen(monkeypatch, capability=80) == _chosen(monkeypatch, width=256) == kernel
  assert _chosen(monkeypatch, dtype=jnp.float32) == kernel
  for what in (dict(capability=75), dict(tokens=63), dict(width=15), dict(width=257), dict(dtype=jnp.float64)):
    assert _chosen(monkeypatch, **what) == none, what
  assert _chosen(monkeypatch, width=256, dtype=jnp.float32) == none


@pytest.mark.parametrize(
  "what, message", [(dict(width=257), "widths up to 256"), (dict(capability=75), r"8.0 \(Ampere\) or newer.* is 7.5")]
)
def test_a_name_that_cannot_serve_is_refused(monkeypatch, what, message):
  monkeypatch.setattr(device, "gpu", lambda: device.Gpu(what.get("capability", 90), 132))
  x = jnp.ones((1, 2, 1, what.get("width", 3)))
  with pytest.raises(NotImplementedError, match=rf"q float32\[1, 2, 1, {x.shape[-1]}\].*{message}.*'chunked_xla' can"):
    linear_attention(x, x, x, jnp.ones(1), scale=1.0, implementation="triton")


def test_not_on_a_tpu():
  forward, operands, *_ = _program("triton", jnp.float32, tokens=5)
  with pytest.raises(NotImplementedError, match=r"none for tpu\. 'auto'"):
    jax.jit(forward).trace(*operands).lower(lowering_platforms=("tpu",))


def test_vmap_is_another_batch():
  case = truth.make_case(20, 2, 3, ())
  q, k, v = (jnp.asarray(case[x]) for x in "qkv")
  run = functools.partial(linear_attention, slopes=case["slopes"], scale=1.0, implementation="triton")
  output, state = jax.jit(jax.vmap(lambda q, k, v: run(q[None], k[None], v[None])))(q, k, v)
  expected = run(q, k, v)
  truth.assert_close({"o": output[:, 0], "s": state[:, 0]}, dict(zip("os", expected, strict=True)), 1e-6)
