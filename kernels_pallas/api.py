"""The two public functions, the checks of their arguments, and the choice of an implementation."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import chunked_xla, decay, mosaic_gpu, mosaic_tpu, primitive, reference, triton, verdict


class Implementation(Protocol):
  """Signature of an implementation of `linear_attention`. Its arguments are checked, and prepared by `_run`.

  Args:
    q_BTHK: [B, T, H, K], queries in the caller's dtype.
    k_BTGK: [B, T, Gk, K], keys in the caller's dtype.
    v_BTGV: [B, T, Gv, V], values in the caller's dtype.
    slopes_H: [H], in the accumulation dtype: float32, or float64 if q, k or v is float64.
    initial_state_BHKV: [B, H, K, V], in the accumulation dtype.
    segment_ids_BT: [B, T] int32, documents numbered from 0 in each row; None: one document.
    lengths_B: [B] int32 in [0, T], number of valid tokens per row; None: no padding.
    scale: factor of the output.

  Returns:
    The output [B, T, H, V] in v's dtype, and the final state [B, H, K, V] in the accumulation dtype.
  """

  def __call__(
    self,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    slopes_H: jax.Array,
    initial_state_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
    lengths_B: jax.Array | None,
    *,
    scale: float,
  ) -> tuple[jax.Array, jax.Array]: ...


IMPLEMENTATIONS: dict[str, Implementation] = {
  "reference": reference.quadratic,
  "recurrent": reference.recurrent,
  "chunked_xla": chunked_xla.chunked,
  "triton": triton.attend,
  "tpu": mosaic_tpu.attend,
  "mosaic_gpu": mosaic_gpu.attend,
}
# Implementation -> function of q, k and v that says why it cannot run them, or returns None. Others run everything.
REFUSALS = {"triton": triton.refusal, "tpu": primitive.refusal, "mosaic_gpu": mosaic_gpu.refusal}
# What "auto" takes where no choice of the verdict in force fits the operands.
FALLBACK = "chunked_xla"


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  slopes: jax.Array,
  *,
  scale: float,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Computes causal linear attention with a fixed decay per head, gamma_h = exp(-slopes_h).

  o_i = scale * (sum_{j<=i} gamma^(i-j) (q_i . k_j) v_j + gamma^(i+1) q_i S_in)
  S   = sum_j gamma^(T-1-j) k_j v_j^T + gamma^T S_in

  This is SUPRA's attention (arXiv 2405.06640, equations 9 and 10) before its normalisation. In the state, the last
  token is not decayed and k is not scaled. Sums are accumulated in float32 (float64 if q, k or v is float64).

  Args:
    q: [B, T, H, K] float, queries.
    k: [B, T, Gk, K] float, keys; Gk divides H and head h reads group h // (H / Gk).
    v: [B, T, Gv, V] float, values; Gv divides H, independently of Gk.
    slopes: [H] float, finite and at least 0. They are constants: differentiating with respect to them raises TypeError.
    scale: factor of the output, not of the state; usually K**-0.5.
    initial_state: [B, H, K, V] float, S_in, which belongs to token 0's document; None means zero.
    segment_ids: [B, T] integer document ids. Wherever the id changes, the state restarts from zero, even if the
      same id occurs earlier in the row. None: each row is one document.
    lengths: [B] integer. Tokens t >= lengths[b] are padding: they may hold anything (even NaN), their output is 0, they
      get no gradient, and they neither add to the state nor decay it. None: no padding.
    implementation: "auto" takes the kernel that the verdict on this device names for such operands (`verdict`), and
      `chunked_xla` if it names none or there is no verdict. A key of `IMPLEMENTATIONS` names the implementation, which
      then runs or raises, without fallback. On a CPU, kernels for GPUs and TPUs are interpreted.

  Returns:
    The output [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 if an input is float64).

  Raises:
    ValueError: if shapes or dtypes do not fit together, slopes are negative or not finite (checked unless they are
      traced), or the implementation is unknown.
    NotImplementedError: if the named implementation does not support these shapes, dtypes or this device.
    TypeError: if the call is differentiated with respect to the slopes.
  """
  _check_operands(q, k, v, slopes, "BT")
  batch, num_tokens, num_heads, key_width = q.shape
  state_shape = (batch, num_heads, key_width, v.shape[-1])
  if initial_state is not None:
    check("initial_state", initial_state, "[B, H, K, V]", state_shape, jnp.floating)
  if segment_ids is not None:
    check("segment_ids", segment_ids, "[B, T]", (batch, num_tokens), jnp.integer)
  if lengths is not None:
    check("lengths", lengths, "[B]", (batch,), jnp.integer)
  names = choose_implementations(implementation, q, k, v)
  return _run(names, float(scale), q, k, v, slopes, initial_state, segment_ids, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(names, scale, q, k, v, slopes, initial_state_BHKV, segment_ids_BT, lengths_B):
  """Prepares checked arguments as `Implementation` describes them and runs the implementations that `names` lists.

  Jitted for callers outside of jit. `names` is what `choose_implementations` returns.
  """
  dtype = _accumulation_dtype(q, k, v)
  if initial_state_BHKV is None:
    initial_state_BHKV = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]))
  arguments = (
    q,
    k,
    v,
    constant(slopes).astype(dtype),
    initial_state_BHKV.astype(dtype),
    None if segment_ids_BT is None else decay.canonical_segments(segment_ids_BT),
    None if lengths_B is None else jnp.clip(lengths_B, 0, q.shape[1]).astype(jnp.int32),
  )
  default, *others = names
  run = functools.partial(IMPLEMENTATIONS[default[1]], scale=scale)
  if not others:
    return run(*arguments)
  ways = {platform: functools.partial(IMPLEMENTATIONS[name], scale=scale) for platform, name in others}
  return jax.lax.platform_dependent(*arguments, default=run, **ways)


def linear_attention_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  slopes: jax.Array,
  state: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes one token of `linear_attention`, for decoding: S <- gamma S + k v^T; o = scale * q S.

  Args:
    q: [B, H, K] float, query.
    k: [B, Gk, K] float, key; Gk divides H.
    v: [B, Gv, V] float, value; Gv divides H.
    slopes: [H] float, finite and at least 0. They are constants: differentiating with respect to them raises TypeError.
    state: [B, H, K, V] float, the state after the previous token; zeros at the start of a document.
    scale: factor of the output.

  Returns:
    The output [B, H, V] in v's dtype and the new state [B, H, K, V] in float32 (float64 if q, k or v is float64).

  Raises:
    ValueError: if shapes or dtypes do not fit together, or slopes are negative or not finite (checked unless they are
      traced).
    TypeError: if the call is differentiated with respect to the slopes.
  """
  _check_operands(q, k, v, slopes, "B")
  state_shape = (*q.shape, v.shape[-1])
  check("state", state, "[B, H, K, V]", state_shape, jnp.floating)
  dtype = _accumulation_dtype(q, k, v)
  slopes = constant(jnp.asarray(slopes)).astype(dtype)
  state = jnp.asarray(state).astype(dtype)
  q, k, v = map(jnp.asarray, (q, k, v))
  return reference.step(q, k, v, slopes, state, scale=float(scale))


def choose_implementations(implementation: str, q, k, v) -> tuple[tuple[str, str], ...]:
  """Returns (platform, implementation) pairs of names. The first, ("default", name), is for all other platforms.

  Args:
    implementation: "auto" or a key of `IMPLEMENTATIONS`; a key gives only the pair ("default", key).
    q, k, v: arrays, or other objects with the `shape` and `dtype` of the operands.

  Raises:
    ValueError: if the implementation is unknown.
    NotImplementedError: if the named implementation cannot run such operands.
  """
  if implementation == "auto":
    meaning = verdict.in_force()
    if not isinstance(meaning, str):
      chosen = {"default": FALLBACK}
      for row in meaning:
        if _fits(row, q, k, v):
          chosen.setdefault(row.platform, row.implementation)
      return tuple(chosen.items())
    implementation = meaning
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation {implementation!r} is none of {['auto', *IMPLEMENTATIONS]}")
  reason = _refusal(implementation, q, k, v)
  if reason is not None:
    shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in zip("qkv", (q, k, v), strict=True))
    raise NotImplementedError(f"implementation {implementation!r} cannot serve {shapes}: {reason}. {FALLBACK!r} can.")
  return (("default", implementation),)


def _refusal(implementation: str, q, k, v) -> str | None:
  return REFUSALS[implementation](q, k, v) if implementation in REFUSALS else None


def _fits(row: verdict.Choice, q, k, v) -> bool:
  widths = sorted([q.shape[-1], v.shape[-1]])
  return (
    all(x.dtype.name == row.dtype for x in (q, k, v))
    and (row.widths[0] <= widths[0] and widths[1] <= row.widths[1])
    and q.shape[1] >= row.tokens
    and row.implementation in IMPLEMENTATIONS
    and _refusal(row.implementation, q, k, v) is None
  )


def _accumulation_dtype(*operands: jax.Array) -> jnp.dtype:
  return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in operands) else jnp.float32)


@jax.custom_jvp
def constant(slopes_H: jax.Array) -> jax.Array:
  """Returns the slopes unchanged. Differentiating with respect to the slopes raises TypeError."""
  return slopes_H


@constant.defjvp
def _constant_jvp(primals, tangents):
  raise TypeError(
    "linear_attention was differentiated with respect to its slopes, which are constants: there is no gradient for"
    " them, and a zero would be silently wrong. Leave them out of the differentiated arguments, or use"
    " jax.lax.stop_gradient(slopes)."
  )


def check(name: str, x: jax.Array, axes: str, shape: tuple[int, ...], kind) -> None:
  """Raises ValueError, which names the operand and its axes, unless x has this shape and a dtype of this kind."""
  if tuple(x.shape) != shape:
    raise ValueError(f"{name} has shape {tuple(x.shape)}, wanted {axes} = {shape}")
  if not jnp.issubdtype(x.dtype, kind):
    raise ValueError(f"{name} has dtype {x.dtype}, wanted one of kind {kind.__name__}")


def _check_operands(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, leading: str) -> None:
  """Checks q, k, v and the slopes; `leading` names the axes before the heads."""
  for name, x, axes in (("q", q, "HK"), ("k", k, "GK"), ("v", v, "GV")):
    if x.ndim != len(leading) + 2:
      raise ValueError(
        f"{name} has shape {tuple(x.shape)}, wanted {len(leading) + 2} axes [{', '.join(leading + axes)}]"
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {x.dtype}, wanted a floating one")
    if x.shape[: len(leading)] != q.shape[: len(leading)]:
      raise ValueError(
        f"{name} has shape {tuple(x.shape)}, wanted the leading [{', '.join(leading)}] of q, {tuple(q.shape)}"
      )
    if 0 in x.shape:
      raise ValueError(f"{name} has shape {tuple(x.shape)}, wanted at least one element along every axis")
  if k.shape[-1] != q.shape[-1]:
    raise ValueError(f"k has width {k.shape[-1]}, wanted the width of q, {q.shape[-1]}")
  num_heads = q.shape[-2]
  for name, x in (("k", k), ("v", v)):
    if num_heads % x.shape[-2]:
      raise ValueError(f"{name} has {x.shape[-2]} heads, wanted a divisor of q's {num_heads}")
  check("slopes", slopes, "[H]", (num_heads,), jnp.floating)
  if not isinstance(slopes, jax.core.Tracer):
    values = np.asarray(slopes, np.float64)
    if not ((values >= 0) & (values <= np.finfo(np.float32).max)).all():
      raise ValueError(
        f"slopes are {np.asarray(slopes)}, wanted all finite and none below 0: gamma = exp(-slope) must not exceed 1"
      )
