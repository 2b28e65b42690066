"""Forward and backward pass of the op out of one primitive, LA, which kernels implement.

LA(q, k, v; S) with the coefficients (intra, inter, into) is, for the token a of a chunk that begins with the state S,

  o_a = intra * sum_{b<=a} gamma^(a-b) (q_a . k_b) v_b + inter * gamma^(a+1) q_a S
  S  <- gamma^n S + into * sum_b gamma^(n-1-b) k_b v_b^T

over all chunks of n tokens; reversed it runs from the last chunk to the first, b >= a, and the weights gamma^(a+1) and
gamma^(n-1-b) change places: the exact transpose. Padding and seams between documents cut the same weights in both
directions. Then, with s the scale, S0 the initial state and dS_T the final one's cotangent,

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
  """Factors of LA's three terms: pairs of one chunk, what outputs see of the state, what enters the state."""

  intra: float
  inter: float
  into: float


class Rows(NamedTuple):
  """What all calls of one op share, as `kernels_pallas.api.Implementation` has it."""

  slopes_H: jax.Array
  segment_ids_BT: jax.Array | None
  lengths_B: jax.Array | None

  def operands(self, padded_tokens: int) -> dict[str, jax.Array]:
    """What kernels are given of them: "slopes", and where there are any "lengths" and "firsts".

    "firsts" [B, padded_tokens] int32 is the token that each token's document begins with.
    """
    operands = {"slopes": self.slopes_H}
    if self.lengths_B is not None:
      operands["lengths"] = self.lengths_B
    if self.segment_ids_BT is not None:
      padding = padded_tokens - self.segment_ids_BT.shape[1]
      operands["firsts"] = jnp.pad(decay.first_tokens(self.segment_ids_BT), ((0, 0), (0, padding)))
    return operands


def refusal(q: Any, k: Any, v: Any) -> str | None:
  """Why no kernel can serve operands of such shapes and dtypes; None if some can."""
  if jnp.float64 in (q.dtype, k.dtype, v.dtype):
    return "it has no float64"
  if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
    return f"it has widths up to {_MAX_WIDTH}"
  return None


def compute_dtype(*operands: Any) -> jnp.dtype:
  """Of products: bfloat16 where all operands are. float16 has not the range for states, hence float32 for it."""
  return jnp.dtype(jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in operands) else jnp.float32)


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype, exact: Any = None) -> jax.Array:
  """The sum over one axis of each, in float32. float32 means float32, whatever jax_default_matmul_precision says.

  Args:
    x, y: matrices.
    axes: of x and of y.
    dtype: both are cast to it.
    exact: the precision that is float32's; None: HIGHEST.
  """
  precision = (exact or jax.lax.Precision.HIGHEST) if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((axes[0],), (axes[1],)), ((), ()))
  operands = x.astype(dtype), y.astype(dtype)
  return jax.lax.dot_general(*operands, dimensions, precision=precision, preferred_element_type=jnp.float32)


class Kernels(Protocol):
  """One way to run LA, with all that was decided about shapes in it. Compared by value: it is a static argument."""

  @property
  def parts(self) -> Parts: ...

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
    """LA of each part from its own state: the output [B, T, H, V] in `dtype`, and the state at the end of the row.

    q may have fewer heads than H, as k and v.
    """
    ...

  def states(self, k_BTGK: jax.Array, v_BTGV: jax.Array, rows: Rows, into: float, *, reverse: bool) -> jax.Array:
    """[B, P - 1, H, K, V] float32: what each part adds to the state, but for the one that runs last."""
    ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernels: Kernels, scale: float, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows: Rows):
  """The op: output, final state, and for the gradient the states that the parts begin with, which take no gradient."""
  states_BPHKV = _part_states(kernels, k_BTGK, v_BTGV, state_BHKV, rows, 1.0, reverse=False)
  coefficients = Coefficients(scale, scale, 1.0)
  output_BTHV, after_BHKV = kernels.attend(
    q_BTHK, k_BTGK, v_BTGV, states_BPHKV, rows, coefficients, reverse=False, dtype=v_BTGV.dtype
  )
  return output_BTHV, after_BHKV, states_BPHKV


def _attend_fwd(kernels, scale, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows):
  # Calls `attend` and not its body, so that a gradient can be differentiated in turn.
  results = attend(kernels, scale, q_BTHK, k_BTGK, v_BTGV, state_BHKV, rows)
  return results, (q_BTHK, k_BTGK, v_BTGV, results[2], rows)


def _attend_bwd(kernels, scale, residuals, cotangents):
  *operands, states_BPHKV, rows = residuals
  d_output_BTHV, d_state_BHKV, _ = cotangents
  return *_gradients(kernels, scale, *operands, states_BPHKV, d_output_BTHV, d_state_BHKV, rows), None


attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(kernels: Kernels, scale: float, q_BTHK, k_BTGK, v_BTGV, states_BPHKV, d_output_BTHV, d_state_BHKV, rows):
  """The gradients of q, k, v and the initial state."""
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
  """Second derivatives are rare: those of `chunked_xla` serve, with zeros for the states that follow from the rest."""
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
  """[B, P, H, K, V]: the state that each part begins with."""
  parts, num_tokens = kernels.parts, k_BTGK.shape[1]
  if parts.num_parts == 1:
    return state_BHKV[:, None]
  added_BPHKV = kernels.states(k_BTGK, v_BTGV, rows, into, reverse=reverse)
  valid_BP, documents_BP = parts_lib.boundaries(parts, num_tokens, rows.segment_ids_BT, rows.lengths_B)
  weights_BHPP = parts_lib.carry_weights(rows.slopes_H, valid_BP, documents_BP)
  return parts_lib.prefix(state_BHKV, added_BPHKV, weights_BHPP, reverse=reverse)


def _sum_groups(x_BTHD: jax.Array, groups: int) -> jax.Array:
  """The sum over the heads of each group, in float32."""
  if x_BTHD.shape[2] == groups:
    return x_BTHD
  x_BTGRD = x_BTHD.reshape(*x_BTHD.shape[:2], groups, -1, x_BTHD.shape[3])
  return jnp.sum(x_BTGRD, axis=3, dtype=jnp.float32).astype(x_BTHD.dtype)
