"""Next-token cross-entropy that never holds [B, T, vocabulary]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from supra_jax.layers import at_least_float32
from supra_jax.transformer import Transformer

Unembed = Callable[[Any, jax.Array], jax.Array]
CHUNK_TOKENS = 512


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
      state and position start afresh at seams, and a document's first token is no target.
    z_loss: weight of the squared logsumexp.
  """
  tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
  weights = None
  if segment_ids is not None:
    weights = segment_ids[:, 1:] == segment_ids[:, :-1]
    segment_ids = segment_ids[:, :-1]
  hidden_BTD, _ = model.apply({"params": params}, tokens[:, :-1], segment_ids=segment_ids)
  table = "embed_tokens" if model.config.tie_embeddings else "lm_head"

  def unembed(table_params, hidden_ND):
    return model.apply({"params": {table: table_params}}, hidden_ND, method="unembed")

  return next_token_loss(unembed, params[table], hidden_BTD, tokens[:, 1:], weights, z_loss=z_loss)


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
  """`sum_t w_t (nll_t + z_loss * logsumexp_t^2)`, over `chunk` tokens at a time.

  The gradient is made on the way forward, where a chunk's logits exist anyway: a chunk costs three products with the
  unembedding, not the four of rematerialisation, and holds no more.

  Args:
    unembed: (params, hidden [N, D]) -> logits [N, vocabulary], float32.
    params: what `unembed` reads; all of its leaves get gradients.
    hidden_BTD: the model's, after the last norm.
    targets_BT: int, the token that follows each position.
    weights_BT: float, 0 where a target does not count; None means 1 everywhere.
    z_loss: weight of the squared logsumexp, 1e-4 in the paper's recipe.
    chunk: tokens a chunk.
  """
  count = targets_BT.size
  weights = jnp.ones(count, jnp.float32) if weights_BT is None else weights_BT.reshape(-1).astype(jnp.float32)
  chunk = min(chunk, count)

  def chunks(x):
    return jnp.pad(x, [(0, -count % chunk)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

  batch = (chunks(hidden_BTD.reshape(count, -1)), chunks(targets_BT.reshape(-1)), chunks(weights))
  loss, nll = _sums(unembed, z_loss, params, *batch)
  return LossSums(loss, nll, weights.sum())


def _chunk_sums(unembed, z_loss, params, hidden_ND, targets_N, weights_N):
  # A padded position may hold NaN, and 0 * NaN is NaN, in the gradients too: hence a selection, before any product.
  hidden_ND = jnp.where(weights_N[:, None] > 0, hidden_ND, jnp.zeros((), hidden_ND.dtype))
  logits = unembed(params, hidden_ND)
  logsumexp = jax.nn.logsumexp(logits, axis=-1)
  nll = logsumexp - jnp.take_along_axis(logits, targets_N[:, None], axis=-1)[:, 0]
  # The same for a target outside the vocabulary.
  nll, square = (jnp.where(weights_N > 0, x * weights_N, 0).sum() for x in (nll, jnp.square(logsumexp)))
  return nll + z_loss * square, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(unembed, z_loss, params, hidden, targets, weights):
  def step(total, chunk):
    return jax.tree.map(jnp.add, total, _chunk_sums(unembed, z_loss, params, *chunk)), None

  zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
  return jax.lax.scan(step, (zero, zero), (hidden, targets, weights))[0]


def _sums_forward(unembed, z_loss, params, hidden, targets, weights):
  chunk_sums = functools.partial(_chunk_sums, unembed, z_loss)
  value_and_grad = jax.value_and_grad(chunk_sums, argnums=(0, 1), has_aux=True)

  def step(carry, chunk):
    (loss, nll), grads = carry
    (chunk_loss, chunk_nll), (chunk_grads, hidden_grad) = value_and_grad(params, *chunk)
    return ((loss + chunk_loss, nll + chunk_nll), jax.tree.map(jnp.add, grads, chunk_grads)), hidden_grad

  zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
  start = ((zero, zero), jax.tree.map(lambda x: at_least_float32(jnp.zeros_like(x)), params))
  (sums, grads), hidden_grads = jax.lax.scan(step, start, (hidden, targets, weights))
  return sums, (jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params), hidden_grads)


def _sums_backward(unembed, z_loss, residuals, cotangents):
  del unembed, z_loss
  scale = cotangents[0]  # nll is reported, not differentiated
  params_grad, hidden_grad = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
  return params_grad, hidden_grad, None, None


_sums.defvjp(_sums_forward, _sums_backward)
