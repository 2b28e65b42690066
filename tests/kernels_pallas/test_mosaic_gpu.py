"""The Mosaic GPU kernel: interpreted against float64 truth, its races, and what it lowers to for an H100."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, linear_attention, mosaic_gpu, mosaic_gpu_kernel, parts, verdict
from kernels_pallas.primitive import Coefficients
from tests.kernels_pallas import cross, truth

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPTIONAL = ("initial_state", "segment_ids", "lengths")
SHAPE = jax.ShapeDtypeStruct


# One worker and two, one tile of the key width and several, widths that are padded; parts, and rows that end inside one
# or before it; heads that share keys or values.
@truth.needs_mosaic_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
  "tokens, count, groups, widths, given",
  [
    (5, 1, (2, 2), (64, 64), ()),
    (150, 1, (2, 2), (40, 128), OPTIONAL),
    (130, 2, (1, 2), (72, 80), OPTIONAL),
    (190, 3, (2, 1), (64, 24), ("segment_ids",)),
    (70, 2, (1, 1), (130, 64), ("initial_state",)),
  ],
  ids=str,
)
def test_interpreted(monkeypatch, tokens, count, groups, widths, given):
  monkeypatch.setattr(parts, "choose_count", lambda *_: count)
  sizes = {"batch": 1 + ("lengths" in given), "heads": 2, "key_width": widths[0], "value_width": widths[1]}
  case = truth.make_case(tokens, *groups, given, **sizes)
  case = truth.rounded(case, jnp.bfloat16) | {"slopes": np.array([0.02, 14.0], np.float32)}
  truth.assert_close(truth.run(truth.direct(mosaic_gpu.attend), case, jnp.bfloat16), truth.by_loop(case), 1e-2)


def _complaints():
  """What the interpreter finds wrong with the kernel's waiting: races, or a barrier that was passed unseen."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

  call = mosaic_gpu_kernel.Call(parts.Parts(1, 5, 64), 310, 1, 64, 128, Coefficients(0.5, 0.5, 1.0), reverse=False)
  rng = np.random.default_rng(0)
  draw = lambda width: jnp.asarray(rng.standard_normal((1, call.padded_tokens, 1, width)), jnp.bfloat16)  # noqa: E731
  given = {"q": draw(64), "k": draw(64), "v": draw(128), "slopes": jnp.ones(1), "lengths": jnp.array([150], jnp.int32)}
  given["states"] = call.split_state(jnp.ones((1, 1, 1, 64, 128)))
  try:
    jax.block_until_ready(jax.jit(lambda given: call.interpreted(given, detect_races=True))(given))
    # jax 0.11 notes races, and goes on.
    return ["RACE DETECTED"] * interpreter.get_races().races_found
  except jax.errors.JaxRuntimeError as error:
    return re.findall("RACE DETECTED|Barrier completed phase", str(error))
  finally:
    interpreter.reset_gpu_interpret_mode_state()


@truth.needs_mosaic_gpu
@pytest.mark.slow
def test_no_races():
  assert _complaints() == []


# What is copied or multiplied is committed first, what was copied is waited for, and no chunk is overwritten too early.
@truth.needs_mosaic_gpu
@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["commit_smem", "wait_smem_to_gmem", "filled", "emptied"])
def test_what_is_not_waited_for_is_found(monkeypatch, left_out):
  if left_out in ("filled", "emptied"):
    arrivals, wait = {"filled": 4, "emptied": 2}[left_out], mosaic_gpu_kernel.plgpu.barrier_wait
    is_left_out = lambda x: hasattr(x, "ref") and x.ref.aval.inner_aval.dtype.num_arrivals == arrivals  # noqa: E731
    monkeypatch.setattr(mosaic_gpu_kernel.plgpu, "barrier_wait", lambda x: None if is_left_out(x) else wait(x))
  else:
    function = getattr(mosaic_gpu_kernel.plgpu, left_out)
    but_at_the_end = lambda n, wait_read_only=False: None if wait_read_only else function(n)  # noqa: E731
    monkeypatch.setattr(
      mosaic_gpu_kernel.plgpu, left_out, but_at_the_end if left_out == "wait_smem_to_gmem" else lambda: None
    )
  assert _complaints() != []


def _program(**sizes):
  return cross.program(truth.direct(mosaic_gpu.attend), jnp.bfloat16, **sizes)


def _kernels(lowered):
  return re.findall(r"stablehlo.custom_call @(mosaic_gpu\w*)", lowered.as_text())


@truth.needs_mosaic_gpu
@pytest.mark.compat
def test_auto_takes_it_where_a_verdict_does():
  forward, operands, *_ = cross.program(linear_attention, jnp.bfloat16)
  with verdict.using(verdict.CANDIDATES):
    assert len(_kernels(cross.lower(forward, *operands))) == 2


@truth.needs_mosaic_gpu
@pytest.mark.parametrize("width", [*(pytest.param(width, marks=pytest.mark.compat) for width in (64, 128)), 200])
def test_lowers_for_an_h100(width):
  forward, operands, gradients, more = _program(width=width)
  # Few heads: parts, so states come first.
  assert len(_kernels(cross.lower(forward, *operands))) == 2
  lowered = cross.lower(gradients, *more)
  assert len(_kernels(lowered)) == 6
  assert "stablehlo.while" not in lowered.as_text()


@truth.needs_mosaic_gpu
def test_many_heads_are_not_cut():
  forward, operands, *_ = _program(batch=64)
  assert len(_kernels(cross.lower(forward, *operands))) == 1


@pytest.mark.parametrize(
  "what, message",
  [
    (dict(), None),
    (dict(width=257), "widths up to 256"),
    (dict(dtype=jnp.float32), "bfloat16 only.*'triton'"),
    (dict(capability=80), "9.0 .Hopper., and this GPU's is 8.0; 'triton'"),
    (dict(capability=100), "9.0 .Hopper., and this GPU's is 10.0; 'triton'"),
  ],
)
def test_refusals(monkeypatch, what, message):
  monkeypatch.setattr(device, "gpu", lambda: device.Gpu(what.get("capability", 90), 132))
  x = SHAPE((1, 2, 1, what.get("width", 64)), what.get("dtype", jnp.bfloat16))
  reason = mosaic_gpu.refusal(x, x, x)
  if jax.__version_info__ < (0, 11):
    message = r"needs jax 0.11 or newer, and this is jax 0\.10"
  assert reason is None if message is None else re.search(message, reason)
