"""The op written as plainly as possible, twice: as a quadratic form and as a recurrence over tokens.

Tests compare all other implementations with these two. The gradients of both come from autodiff. The arguments are
those of `kernels_pallas.api.Implementation`.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import decay


def _per_head(x_BTGD: jax.Array, num_heads: int, dtype: jnp.dtype) -> jax.Array:
  """Repeats G heads to H = num_heads: query head h reads head h // (H / G). Casts to `dtype`."""
  return jnp.repeat(x_BTGD.astype(dtype), num_heads // x_BTGD.shape[2], axis=2)


def quadratic(
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
  """Computes o_i = scale * (sum_{j<=i} gamma^(i-j) (q_i . k_j) v_j + gamma^(i+1) q_i S_in), all pairs (i, j) at once.

  Returns:
    The output [B, T, H, V] in v's dtype, and the state S = sum_j gamma^(T-1-j) k_j v_j^T + gamma^T S_in, [B, H, K, V].
  """
  (batch, num_tokens, num_heads, _), dtype = q_BTHK.shape, slopes_H.dtype
  if lengths_B is None:
    lengths_B = jnp.full((batch,), num_tokens, jnp.int32)
  if segment_ids_BT is None:
    segment_ids_BT = jnp.zeros((batch, num_tokens), jnp.int32)
  valid_BT = decay.valid_tokens(lengths_B, 0, num_tokens)
  q_BTHK = decay.keep(valid_BT, q_BTHK.astype(dtype))
  k_BTHK = decay.keep(valid_BT, _per_head(k_BTGK, num_heads, dtype))
  v_BTHV = decay.keep(valid_BT, _per_head(v_BTGV, num_heads, dtype))

  positions_T = jnp.arange(num_tokens)
  same_document_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  first_document_BT = segment_ids_BT == 0
  scores_BHTT = jnp.einsum("bihk,bjhk->bhij", q_BTHK, k_BTHK)
  scores_BHTT = scores_BHTT * decay.causal_powers(slopes_H, num_tokens) * same_document_BTT[:, None]
  carried_BHT = decay.powers(slopes_H, positions_T + 1) * first_document_BT[:, None]
  output_BTHV = jnp.einsum("bhij,bjhv->bihv", scores_BHTT, v_BTHV)
  output_BTHV += jnp.einsum("bhi,bihk,bhkv->bihv", carried_BHT, q_BTHK, initial_state_BHKV)

  last_B = jnp.maximum(lengths_B - 1, 0)  # 0 for an empty row: the initial state belongs to token 0's document
  last_document_B = jnp.take_along_axis(segment_ids_BT, last_B[:, None], axis=1)
  token_HBT = decay.powers(slopes_H, last_B[:, None] - positions_T) * (segment_ids_BT == last_document_B)
  carry_HB = decay.powers(slopes_H, lengths_B) * (last_document_B[:, 0] == 0)
  state_BHKV = jnp.einsum("hbt,bthk,bthv->bhkv", token_HBT, k_BTHK, v_BTHV)
  state_BHKV += carry_HB.T[:, :, None, None] * initial_state_BHKV
  return (decay.keep(valid_BT, output_BTHV) * scale).astype(v_BTGV.dtype), state_BHKV


def step(
  q_BHK: jax.Array,
  k_BGK: jax.Array,
  v_BGV: jax.Array,
  slopes_H: jax.Array,
  state_BHKV: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Reads one token: S <- gamma S + k v^T, o = scale * q S. Returns o [B, H, V] in v's dtype, and S [B, H, K, V]."""
  q_BTHK, num_heads, dtype = q_BHK[:, None].astype(slopes_H.dtype), q_BHK.shape[1], slopes_H.dtype
  k_BHK = _per_head(k_BGK[:, None], num_heads, dtype)[:, 0]
  v_BHV = _per_head(v_BGV[:, None], num_heads, dtype)[:, 0]
  gamma_H11 = jnp.exp(-slopes_H)[:, None, None]
  state_BHKV = gamma_H11 * state_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
  output_BHV = jnp.einsum("bhk,bhkv->bhv", q_BTHK[:, 0], state_BHKV) * scale
  return output_BHV.astype(v_BGV.dtype), state_BHKV


def recurrent(
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
  """Runs `step` over all tokens with `jax.lax.scan`, as in decoding. Returns what `quadratic` does, up to rounding."""
  batch, num_tokens = q_BTHK.shape[:2]
  valid_BT = jnp.ones((batch, num_tokens), bool)
  if lengths_B is not None:
    valid_BT = decay.valid_tokens(lengths_B, 0, num_tokens)
  new_document_BT = jnp.zeros((batch, num_tokens), bool)
  if segment_ids_BT is not None:
    new_document_BT = jnp.diff(segment_ids_BT, axis=1, prepend=0) > 0

  def token(state_BHKV, inputs):
    q_BHK, k_BGK, v_BGV, valid_B, new_document_B = inputs
    before_BHKV = jnp.where(new_document_B[:, None, None, None], 0, state_BHKV)
    output_BHV, after_BHKV = step(q_BHK, k_BGK, v_BGV, slopes_H, before_BHKV, scale=scale)
    return jnp.where(valid_B[:, None, None, None], after_BHKV, state_BHKV), output_BHV

  inputs = (*(decay.keep(valid_BT, x) for x in (q_BTHK, k_BTGK, v_BTGV)), valid_BT, new_document_BT)
  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
  state_BHKV, output_TBHV = jax.lax.scan(token, initial_state_BHKV, inputs)
  return decay.keep(valid_BT, jnp.moveaxis(output_TBHV, 0, 1)), state_BHKV
