"""Forward and backward pass of the op, both built from one primitive, LA, which the kernels implement.

LA(q, k, v; S) with the coefficients (intra, inter, into) runs over chunks of n tokens. For token a of a chunk that
begins with the state S,

  o_a = intra * sum_{b<=a} gamma^(a-b) (q_a . k_b) v_b + inter * gamma^(a+1) q_a S
  S  <- gamma^n S + into * sum_b gamma^(n-1-b) k_b v_b^T

LA_rev, the reversed LA, runs from the last chunk to the first, sums over b >= a, and swaps the weights gamma^(a+1) and
gamma^(n-1-b). LA_rev is the exact transpose of LA. Padding and document boundaries zero the same weights in both
directions. With s the scale, S0 the initial state, do the output's cotangent and dS_T the final state's,

  o       = LA(q, k, v; S0),         coefficients (s, s, 1)
  dq      = LA(do, v, k; S0^T),      coefficients (s, s, 1)
  dk      = LA_rev(v, do, q; dS_T^T), coefficients (s, 1, s)
  dv, dS0 = LA_rev(k, q, do; dS_T),   coefficients (s, 1, s).
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas import chunked_xla, decay
from kernels_pallas import parts as parts_lib
from kernels_pallas.parts import Parts

_MAX_WIDTH = 256


class Coefficients(NamedTuple):
  """Factors of the three terms of LA, in the equations at the top of this file.

  Attributes:
    intra: factor of the sum over pairs of tokens in a chunk.
    inter: factor of the state's share in the output.
    into: factor of the tokens' share in the state.
  """

  intra: float
  inter: float
  into: float


class Rows(NamedTuple):
  """The arguments that all calls of LA in one op share; `kernels_pallas.api.Implementation` describes them."""

  slopes_H: jax.Array
  segment_ids_BT: jax.Array | None
  lengths_B: jax.Array | None

  def operands(self, padded_tokens: int) -> dict[str, jax.Array]:
    """Returns name -> operand: "slopes"; "lengths" unless lengths_B is None; "firsts" unless segment_ids_BT is None.

    "firsts", [B, padded_tokens] int32, is the index of the first token of each token's document.
    """
    operands = {"slopes": self.slopes_H}
    if self.lengths_B is not None:
      operands["lengths"] = self.lengths_B
    if self.segment_ids_BT is not None:
      padding = padded_tokens - self.segment_ids_BT.shape[1]
      operands["firsts"] = jnp.pad(decay.first_tokens(self.segment_ids_BT), ((0, 0), (0, padding)))
    return operands


def refusal(q: Any, k: Any, v: Any) -> str | None:
  """Returns why no kernel supports operands of these shapes and dtypes, as an English clause; None if one does."""
  if jnp.float64 in (q.dtype, k.dtype, v.dtype):
    return "it does not support float64"
  if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
    return f"it supports widths up to {_MAX_WIDTH}"
  return None


def compute_dtype(*operands: Any) -> jnp.dtype:
  """Returns the dtype of the operands of matrix products: bfloat16 if all operands of the op have it, else float32.

  float16 operands are cast to float32, because states may exceed float16's range.
  """
  return jnp.dtype(jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in operands) else jnp.float32)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype, exact: Any = None) -> jax.Array:
  """Returns the product of two matrices, in float32; float32 operands are not rounded, unlike by jax's default.

  Args:
    x, y: matrices.
    axes: the axis of x and the axis of y that are summed over.
    dtype: dtype to which both matrices are cast first.
    exact: precision argument of `dot_general` that gives exact float32 products; None means `Precision.HIGHEST`.
  """
  precision = (exact or jax.lax.Precision.HIGHEST) if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((axes[0],), (axes[1],)), ((), ()))
  operands = x.astype(dtype), y.astype(dtype)
  return jax.lax.dot_general(*operands, dimensions, precision=precision, preferred_element_type=jnp.float32)


class Kernels(Protocol):
  """One implementation of LA, with the choices made for given shapes.

  Instances are static arguments of `attend`, so they must be hashable and compare by value.
  """

  @property
  def parts(self) -> Parts:
    """How a row is cut: into chunks of tokens, each of which is a matrix product, and chunks into parts, which run in
    parallel."""
    ...

  def attend(
    self,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    states_BPHKV: jax.Array,
    rows: Rows,
    coefficients: Coefficients,
    *,
    reverse: bool,
    dtype: jnp.dtype,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs LA on each part, from the part's own initial state.

    q, k and v may each have any number of heads that divides H; states_BPHKV is float32.

    Returns:
      The output [B, T, H, V] in `dtype`, and the state [B, H, K, V] float32 at the end of the row (at its beginning if
      `reverse`).
    """
    ...

  def states(self, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, into: float, *, reverse: bool) -> jax.Array:
    """Runs LA's second equation on each part, starting from a zero state, without computing outputs.

    Returns:
      What each part but the last to run adds to the state, [B, P - 1, H, K, V] float32, in the order of the tokens.
    """
    ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernels: Kernels, scale: float, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows: Rows):
  """Computes the op. Returns the output, the final state, and the parts' initial states, [B, P, H, K, V] float32.

  The third result is for the backward pass only; its cotangent is ignored.
  """
  states_BPHKV = _part_states(kernels, k_BTGK, v_BTGV, state_BHKV, rows, 1.0, reverse=False)
  coefficients = Coefficients(scale, scale, 1.0)
  output_BTHV, after_BHKV = kernels.attend(
    q_BTHK, k_BTGK, v_BTGV, states_BPHKV, rows, coefficients, reverse=False, dtype=v_BTGV.dtype
  )
  return output_BTHV, after_BHKV, states_BPHKV


def _attend_fwd(kernels, scale, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows):
  # Calls `attend`, not its body, so that the gradient can itself be differentiated.
  results = attend(kernels, scale, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows)
  return results, (q_BTHK, k_BTGK, v_BTGV, results[2], rows)


def _attend_bwd(kernels, scale, residuals, cotangents):
  *operands, states_BPHKV, rows = residuals
  d_output_BTHV, d_state_BHKV, _ = cotangents
  return *_gradients(kernels, scale, *operands, states_BPHKV, d_output_BTHV, d_state_BHKV, rows), None


attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(kernels: Kernels, scale: float, q_BTHK, k_BTGK, v_BTGV, states_BPHKV, d_output_BTHV, d_state_BHKV, rows):
  """Returns the gradients of q, k, v and the initial state, by the equations at the top of this file.

  Args:
    kernels, scale, q_BTHK, k_BTGK, v_BTGV, rows: as in `attend`.
    states_BPHKV: initial states of the parts, the third result of `attend`.
    d_output_BTHV, d_state_BHKV: cotangents of the output and the final state.
  """
  forward, backward = Coefficients(scale, scale, 1.0), Coefficients(scale, 1.0, scale)
  transposed = functools.partial(jnp.swapaxes, axis1=3, axis2=4)
  ends_BPHKV = _part_states(kernels, q_BTHK, d_output_BTHV, d_state_BHKV, rows, scale, reverse=True)
  dq_BTHK, _ = kernels.attend(
    d_output_BTHV, v_BTGV, k_BTGK, transposed(states_BPHKV), rows, forward, reverse=False, dtype=q_BTHK.dtype
  )
  dk_BTHK, _ = kernels.attend(
    v_BTGV, d_output_BTHV, q_BTHK, transposed(ends_BPHKV), rows, backward, reverse=True, dtype=k_BTGK.dtype
  )
  dv_BTHV, d_before_BHKV = kernels.attend(
    k_BTGK, q_BTHK, d_output_BTHV, ends_BPHKV, rows, backward, reverse=True, dtype=v_BTGV.dtype
  )
  return dq_BTHK, _sum_groups(dk_BTHK, k_BTGK.shape[2]), _sum_groups(dv_BTHV, v_BTGV.shape[2]), d_before_BHKV


def _gradients_fwd(kernels, scale, *arguments):
  return _gradients(kernels, scale, *arguments), arguments


def _gradients_bwd(kernels, scale, arguments, cotangents):
  """Differentiates the gradients through `chunked_xla`, because second derivatives are rare.

  The gradient of the initial state is written to [:, 0] of the gradient of states_BPHKV. The gradient of the other
  states is 0, since they follow from the initial state.
  """
  del kernels
  *operands, states_BPHKV, d_output_BTHV, d_state_BHKV, rows = arguments

  def gradients(q_BTHK, k_BTGK, v_BTGV, state_BHKV, d_output_BTHV, d_state_BHKV):
    def op(q_BTHK, k_BTGK, v_BTGV, state_BHKV):
      slopes_H, segment_ids_BT, lengths_B = rows
      return chunked_xla.chunked(q_BTHK, k_BTGK, v_BTGV, slopes_H, state_BHKV, segment_ids_BT, lengths_B, scale=scale)

    _, pullback = jax.vjp(op, q_BTHK, k_BTGK, v_BTGV, state_BHKV)
    return pullback((d_output_BTHV, d_state_BHKV))

  _, pullback = jax.vjp(gradients, *operands, states_BPHKV[:, 0], d_output_BTHV, d_state_BHKV)
  *d_operands, d_state, d_d_output, d_d_state = pullback(cotangents)
  d_states_BPHKV = jnp.zeros_like(states_BPHKV).at[:, 0].set(d_state)
  return *d_operands, d_states_BPHKV, d_d_output, d_d_state, None


_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _part_states(kernels: Kernels, k_BTGK, v_BTGV, state_BHKV, rows: Rows, into: float, *, reverse: bool):
  """Returns the state from which each part starts, [B, P, H, K, V]; see `parts.prefix`."""
  parts, num_tokens = kernels.parts, k_BTGK.shape[1]
  if parts.num_parts == 1:
    return state_BHKV[:, None]
  added_BPHKV = kernels.states(k_BTGK, v_BTGV, rows, into, reverse=reverse)
  valid_BP, documents_BP = parts_lib.boundaries(parts, num_tokens, rows.segment_ids_BT, rows.lengths_B)
  weights_BHPP = parts_lib.carry_weights(rows.slopes_H, valid_BP, documents_BP)
  return parts_lib.prefix(state_BHKV, added_BPHKV, weights_BHPP, reverse=reverse)


def _sum_groups(x_BTHD: jax.Array, groups: int) -> jax.Array:
  """Sums over the heads of each group, in float32: [B, T, H, D] -> [B, T, groups, D], in the dtype of x."""
  if x_BTHD.shape[2] == groups:
    return x_BTHD
  x_BTGRD = x_BTHD.reshape(*x_BTHD.shape[:2], groups, -1, x_BTHD.shape[3])
  return jnp.sum(x_BTGRD, axis=3, dtype=jnp.float32).astype(x_BTHD.dtype)
