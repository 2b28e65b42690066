"""The op on NVIDIA's Hopper: an `Implementation` that runs the kernel of `kernels_pallas.mosaic_gpu_kernel`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import by_platform, device, primitive
from kernels_pallas import parts as parts_lib
from kernels_pallas.mosaic_gpu_kernel import CHUNK, HAS_KERNEL, TILE, Call, choose_workers, padded
from kernels_pallas.parts import Parts
from kernels_pallas.primitive import Coefficients, Rows


def refusal(q: Any, k: Any, v: Any) -> str | None:
  """Returns why this kernel cannot run q, k and v on the GPU of `device.gpu`, as an English clause; None if it can."""
  if not HAS_KERNEL:
    return f"it needs jax 0.11 or newer, and this is jax {jax.__version__}; 'triton' does not"
  if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
    return "it supports bfloat16 only, since warpgroups have no exact product of float32; 'triton' supports more"
  reason, capability = primitive.refusal(q, k, v), device.gpu().capability
  if reason is None and capability // 10 != 9:
    reason = f"it needs compute capability 9.0 (Hopper), and this GPU's is {capability / 10}; 'triton' supports more"
  return reason


def attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  slopes_H: jax.Array,
  initial_state_BHKV: jax.Array,
  segment_ids_BT: jax.Array | None,
  lengths_B: jax.Array | None,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes the op with the Mosaic GPU kernel; arguments and results as in `kernels_pallas.api.Implementation`.

  For the backward pass, the forward pass keeps the operands and the initial state of each part.
  """
  (batch, num_tokens, heads, key_width), value_width = q_BTHK.shape, v_BTGV.shape[-1]
  programs = batch * heads * (padded(value_width) // (choose_workers(key_width, value_width) * TILE))
  count = parts_lib.choose_count(programs, -(-num_tokens // CHUNK), device.gpu().multiprocessors)
  kernels = _Kernels(parts_lib.cut(num_tokens, CHUNK, count))
  rows = Rows(slopes_H, segment_ids_BT, lengths_B)
  return primitive.attend(kernels, scale, q_BTHK, k_BTGK, v_BTGV, initial_state_BHKV, rows)[:2]


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """`kernels_pallas.primitive.Kernels` with the Mosaic GPU lowering; `parts` says how a row is cut."""

  parts: Parts

  def attend(self, q, k, v, states_BPHKV, rows, coefficients, *, reverse, dtype):
    batch, _, heads, key_width, value_width = states_BPHKV.shape
    call = Call(self.parts, k.shape[1], heads, padded(key_width), padded(value_width), coefficients, reverse)
    given = {"q": q, "k": k, "v": v, "states": call.split_state(states_BPHKV)}
    results = _run(call, given, rows, batch)
    output_BTHV = results["output"][:, : k.shape[1], :, :value_width].astype(dtype)
    return output_BTHV, call.join_state(results["final"])[..., :key_width, :value_width]

  def states(self, k, v, rows, into, *, reverse):
    heads, key_width, value_width = rows.slopes_H.size, k.shape[3], v.shape[3]
    coefficients, widths = Coefficients(0.0, 0.0, into), (padded(key_width), padded(value_width))
    call = Call(self.parts, k.shape[1], heads, *widths, coefficients, reverse, states_only=True)
    results = _run(call, {"k": k, "v": v}, rows, k.shape[0])
    return call.join_state(results["added"])[..., :key_width, :value_width]


def _run(call: Call, given: dict[str, jax.Array], rows: Rows, batch: int) -> dict[str, jax.Array]:
  """Pads q, k and v, [B, T, heads, width], to the token count and the widths of `call`, and runs the kernel.

  The states in `given` are already cut into tiles by `Call.split_state`.

  Returns:
    Name -> array of each result, see `Call.results`.
  """

  def widen(x_BTHD: jax.Array) -> jax.Array:
    width = x_BTHD.shape[3]
    return jnp.pad(x_BTHD, ((0, 0), (0, call.padded_tokens - call.tokens), (0, 0), (0, padded(width) - width)))

  given = {name: x if name == "states" else widen(x) for name, x in given.items()}
  given |= rows.operands(call.parts.tokens)
  # The interpreter orders kernels by a JAX effect, which `by_platform`'s primitive does not have.
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if jax.default_backend() == "cpu" and (abstract is None or abstract.platform != "gpu"):
    return call.interpreted(given)
  return by_platform.run("cuda", call, given, call.results(batch))
