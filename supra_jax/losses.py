"""Next-token cross-entropy that never holds [B, T, vocabulary]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from supra_jax.layers import at_least_float32
from supra_jax.sharding import sum_over_tokens
from supra_jax.transformer import Transformer

Unembed = Callable[[Any, jax.Array], jax.Array]
CHUNK_TOKENS = 512  # of one device


@flax.struct.dataclass
class LossSums:
  """Sums over the target tokens, float32 scalars.

  Attributes:
    loss: cross-entropy plus z-loss; the one that has a gradient.
    nll: cross-entropy, nats.
    weight: of the targets; divide by it for means.
  """

  loss: jax.Array
  nll: jax.Array
  weight: jax.Array


def language_model_loss(
  model: Transformer, params: Mapping[str, Any], batch: Mapping[str, jax.Array], *, z_loss: float = 0.0
) -> LossSums:
  """The loss of a batch of packed rows.

  Args:
    model: what reads them.
    params: the model's.
    batch: `tokens` int32 [B, T + 1]: T inputs and, one later, their targets. With `segment_ids` of the same shape,
      state and position start afresh at seams, and a document's first token is no target. With `row_weights` float32
      [B], a row counts so much.
    z_loss: weight of the squared logsumexp.
  """
  tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
  weights = _target_weights(batch)
  segment_ids = None if segment_ids is None else segment_ids[:, :-1]
  hidden_BTD, _ = model.apply({"params": params}, tokens[:, :-1], segment_ids=segment_ids)
  table = "embed_tokens" if model.config.tie_embeddings else "lm_head"

  def unembed(table_params, hidden):
    return model.apply({"params": {table: table_params}}, hidden, method="unembed")

  return next_token_loss(unembed, params[table], hidden_BTD, tokens[:, 1:], weights, z_loss=z_loss)


def _target_weights(batch: Mapping[str, jax.Array]) -> jax.Array:
  """[..., T]: 1 where a row's next token is a target, times the row's weight."""
  weights = jnp.ones(batch["tokens"][..., 1:].shape, jnp.float32)
  if (segment_ids := batch.get("segment_ids")) is not None:
    weights *= segment_ids[..., 1:] == segment_ids[..., :-1]
  if (row_weights := batch.get("row_weights")) is not None:
    weights *= row_weights[..., None]
  return weights


def count_targets(batch: Mapping[str, jax.Array]) -> jax.Array:
  """The weight of all targets of a batch [..., T + 1], at least 1; known before any is predicted."""
  return jnp.maximum(_target_weights(batch).sum(), 1.0)


def next_token_loss(
  unembed: Unembed,
  params: Any,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  chunk: int = CHUNK_TOKENS,
) -> LossSums:
  """`sum_t w_t (nll_t + z_loss * logsumexp_t^2)`, over some positions of a device's rows at a time.

  The gradient is made on the way forward, where a chunk's logits exist anyway: a chunk costs three products with the
  unembedding, not the four of rematerialisation, and holds no more.

  Args:
    unembed: (params, hidden [B, C, D]) -> logits [B, C, vocabulary], float32.
    params: what `unembed` reads; all of its leaves get gradients.
    hidden_BTD: the model's, after the last norm.
    targets_BT: int, the token that follows each position.
    weights_BT: float, 0 where a target does not count; None means 1 everywhere.
    z_loss: weight of the squared logsumexp, 1e-4 in the paper's recipe.
    chunk: tokens a chunk and device.
  """
  weights = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT.astype(jnp.float32)
  loss, nll = _sums(unembed, z_loss, chunk, params, hidden_BTD, targets_BT, weights)
  return LossSums(loss, nll, weights.sum())


def _chunks(x_BT: jax.Array, tokens: int) -> jax.Array:
  """[B, T, ...] -> [chunks, B, positions, ...], the last chunk padded with zeros."""
  batch, time = x_BT.shape[:2]
  positions = min(max(tokens // batch, 1), time)
  x = jnp.pad(x_BT, [(0, 0), (0, -time % positions)] + [(0, 0)] * (x_BT.ndim - 2))
  return jnp.moveaxis(x.reshape(batch, -1, positions, *x.shape[2:]), 1, 0)


def _chunk_sums(unembed, z_loss, params, hidden_BCD, targets_BC, weights_BC):
  # A padded position may hold NaN, and 0 * NaN is NaN, in the gradients too: hence a selection, before any product.
  hidden_BCD = jnp.where(weights_BC[..., None] > 0, hidden_BCD, jnp.zeros((), hidden_BCD.dtype))
  logits = unembed(params, hidden_BCD)
  # One row a token: a leading axis of length 1 costs XLA's CPU backend a tenth of the whole chunk.
  logits, targets, weights = logits.reshape(-1, logits.shape[-1]), targets_BC.reshape(-1), weights_BC.reshape(-1)
  logsumexp = jax.nn.logsumexp(logits, axis=-1)
  nll = logsumexp - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  # The same for a target outside the vocabulary.
  nll, square = (jnp.where(weights > 0, x * weights, 0).sum() for x in (nll, jnp.square(logsumexp)))
  return nll + z_loss * square, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(unembed, z_loss, chunk, params, hidden, targets, weights):
  def scan(params, *rows):
    def step(total, part):
      return jax.tree.map(jnp.add, total, _chunk_sums(unembed, z_loss, params, *part)), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(step, (zero, zero), tuple(_chunks(x, chunk) for x in rows))

  return sum_over_tokens(scan)(params, hidden, targets, weights)[0]


def _sums_forward(unembed, z_loss, chunk, params, hidden, targets, weights):
  chunk_sums = functools.partial(_chunk_sums, unembed, z_loss)
  value_and_grad = jax.value_and_grad(chunk_sums, argnums=(0, 1), has_aux=True)

  def scan(params, *rows):
    def step(carry, part):
      (loss, nll), grads = carry
      (part_loss, part_nll), (part_grads, hidden_grad) = value_and_grad(params, *part)
      return ((loss + part_loss, nll + part_nll), jax.tree.map(jnp.add, grads, part_grads)), hidden_grad

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    start = ((zero, zero), jax.tree.map(lambda x: at_least_float32(jnp.zeros_like(x)), params))
    sums, hidden_grads = jax.lax.scan(step, start, tuple(_chunks(x, chunk) for x in rows))
    batch, time, width = rows[0].shape
    return sums, jnp.moveaxis(hidden_grads, 0, 1).reshape(batch, -1, width)[:, :time]

  (sums, grads), hidden_grads = sum_over_tokens(scan)(params, hidden, targets, weights)
  return sums, (jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params), hidden_grads)


def _sums_backward(unembed, z_loss, chunk, residuals, cotangents):
  del unembed, z_loss, chunk
  scale = cotangents[0]  # nll is reported, not differentiated
  params_grad, hidden_grad = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
  return params_grad, hidden_grad, None, None


_sums.defvjp(_sums_forward, _sums_backward)
