"""The op with context parallelism: each device holds a slice of consecutive tokens of every row.

A device's tokens depend on earlier devices only through one state per head. Each device runs the op from a zero state;
the final states of all devices are gathered; then each device adds the contribution of the state before its first
token. Each device sends [B, H, K, V] float32, independent of T.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import api, decay, parts


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  slopes: jax.Array,
  *,
  axis: str,
  scale: float,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Computes `kernels_pallas.linear_attention` inside `jax.shard_map`, over rows sharded along one axis of the mesh.

  All devices along that axis call this function. T is the number of tokens per device, equal on all devices; device 0
  has the first tokens of each row.

  Args:
    q, k, v: [B, T, heads, width] float, queries, keys and values of the device's tokens.
    slopes: [H] float, the same on all devices.
    axis: name of the mesh axis along which tokens are sharded.
    scale: factor of the output.
    initial_state: [B, H, K, V] float, state before the row's first token, the same on all devices; None: zero.
    segment_ids: [B, T] integer, document ids of the device's tokens; None: each row is one document.
    lengths: [B] integer, lengths of the whole rows, the same on all devices; None: no padding.
    implementation: as in `kernels_pallas.linear_attention`, which runs on each device's tokens.

  Returns:
    The output [B, T, H, V] of the device's tokens, in v's dtype, and the state [B, H, K, V] at the end of the whole
    row, the same on all devices, in float32 (float64 if q, k or v is float64).

  Raises:
    ValueError, NotImplementedError, TypeError: as `kernels_pallas.linear_attention`.
  """
  size, rank, (batch, tokens) = jax.lax.axis_size(axis), jax.lax.axis_index(axis), q.shape[:2]
  own_lengths = None if lengths is None else jnp.clip(lengths - rank * tokens, 0, tokens)
  out, added = api.linear_attention(
    q, k, v, slopes, scale=scale, segment_ids=segment_ids, lengths=own_lengths, implementation=implementation
  )
  # Boundary r is before the first token of device r; the last boundary is the end of the row.
  valid_BP = jnp.atleast_2d(tokens * jnp.arange(size + 1))
  valid_BP = valid_BP if lengths is None else jnp.minimum(valid_BP, lengths[:, None])
  own_documents, documents_BP = None, None
  if segment_ids is not None:
    own_documents, documents_BP = _documents(segment_ids, own_lengths, axis)
  slopes_H = api.constant(slopes).astype(added.dtype)
  weights_BHPP = parts.carry_weights(slopes_H, valid_BP, documents_BP)
  states_BPHKV = jax.lax.all_gather(added, axis, axis=1)
  if initial_state is None:
    weights_BHPP = weights_BHPP[..., 1:]
  else:
    api.check("initial_state", initial_state, "[B, H, K, V]", added.shape, jnp.floating)
    states_BPHKV = jnp.concatenate([initial_state.astype(added.dtype)[:, None], states_BPHKV], axis=1)
  # Selects the weights of this device's boundary and of the last one.
  weights_BHP2 = jnp.stack([weights_BHPP[:, :, rank], weights_BHPP[:, :, size]], axis=-1)
  weights_BHP2 = jnp.broadcast_to(weights_BHP2, (batch, *weights_BHP2.shape[1:]))
  exact = jax.lax.Precision.HIGHEST
  before, final = jnp.einsum("bhpn,bphkv->nbhkv", weights_BHP2, states_BPHKV, precision=exact)

  seen_TH = scale * decay.powers(slopes_H, jnp.arange(tokens) + 1).T
  seen_BTH = jnp.broadcast_to(seen_TH, (batch, *seen_TH.shape))
  if own_documents is not None and documents_BP is not None:
    seen_BTH *= (own_documents == documents_BP[:, rank, None])[..., None]
  if own_lengths is not None:
    valid_BT = decay.valid_tokens(own_lengths, 0, tokens)
    seen_BTH, q = seen_BTH * valid_BT[..., None], decay.keep(valid_BT, q)
  dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype  # states may exceed float16's range
  wide = jnp.float32 if dtype == jnp.bfloat16 else None
  product = jnp.einsum(
    "bthk,bhkv->bthv",
    q.astype(dtype),
    before.astype(dtype),
    precision=jax.lax.Precision.DEFAULT if wide else exact,
    preferred_element_type=wide,
  )
  return (out.astype(added.dtype) + seen_BTH[..., None] * product).astype(out.dtype), final


def _documents(segment_ids_BT: jax.Array, lengths_B: jax.Array | None, axis: str) -> tuple[jax.Array, jax.Array]:
  """Numbers the documents of the whole row from 0. P is the number of devices.

  Args:
    segment_ids_BT: [B, T] integer, document ids of the device's tokens.
    lengths_B: [B] int32, number of valid tokens on this device; None: no padding.
    axis: name of the mesh axis along which tokens are sharded.

  Returns:
    The document number of each of this device's tokens, [B, T] int32, and of the state at each of the P + 1 boundaries
    between devices, both ends of the row included, [B, P + 1] int32.
  """
  own_BT = decay.canonical_segments(segment_ids_BT)
  dtype = jnp.promote_types(segment_ids_BT.dtype, jnp.int32)
  ends_3B = jnp.stack([x.astype(dtype) for x in (segment_ids_BT[:, 0], segment_ids_BT[:, -1], own_BT[:, -1])])
  firsts_PB, lasts_PB, counts_PB = jnp.moveaxis(jax.lax.all_gather(ends_3B, axis), 1, 0)
  begun_PB = counts_PB[:-1].astype(jnp.int32) + (firsts_PB[1:] != lasts_PB[:-1])
  before_PB = jnp.pad(jnp.cumsum(begun_PB, axis=0), ((1, 0), (0, 0)))
  own_BT += before_PB[jax.lax.axis_index(axis)][:, None]
  # A state belongs to the document of the last valid token before it; the row's first state belongs to token 0's.
  if lengths_B is None:
    last_B = own_BT[:, -1]
  else:
    last_B = jnp.take_along_axis(own_BT, jnp.maximum(lengths_B - 1, 0)[:, None], axis=1)[:, 0]
    last_B = jnp.where(lengths_B > 0, last_B, 0)
  documents_PB = jax.lax.cummax(jax.lax.all_gather(last_B, axis), axis=0)
  return own_BT, jnp.pad(documents_PB, ((1, 0), (0, 0))).T
