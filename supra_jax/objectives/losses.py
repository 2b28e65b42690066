"""Training losses: next-token cross-entropy and KL divergence from a teacher, computed in chunks of tokens.

Logits of all tokens, [B, T, vocabulary], are never in memory at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import sum_over_tokens
from supra_jax.core.xla_cpu import one_row_a_token
from supra_jax.model.layers import at_least_float32
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.layer_losses import Streams, attention_error, read_streams, streams_error

Unembed = Callable[[Any, jax.Array], jax.Array]
CHUNK_TOKENS = 512  # tokens per chunk and device


@flax.struct.dataclass
class LossSums:
  """Weighted sums over the target tokens, float32 scalars.

  Attributes:
    loss: the training loss: cross-entropy mixed with the divergence from the teacher, plus z-loss and, with
      `Teacher.hidden_weight`, the error of the residual streams. Only `loss` has a gradient.
    nll: cross-entropy in nats.
    weight: sum of the weights of the targets; divide the other sums by `weight` for means.
  """

  loss: jax.Array
  nll: jax.Array
  weight: jax.Array


@flax.struct.dataclass
class Teacher:
  """A transformer that the model is distilled from.

  Attributes:
    params: parameters of the teacher.
    model: the teacher's Flax module. Its vocabulary and `tie_embeddings` have to be those of the model that trains.
    weight: weight a of the divergence KL(teacher || model) of next tokens; cross-entropy has the weight 1 - a.
    hidden_weight: weight of `layer_losses.streams_error`, which is added to the loss. If `hidden_weight` is not 0,
      teacher and model have to be stacked.
  """

  params: Any
  model: Transformer = flax.struct.field(pytree_node=False)
  weight: float = flax.struct.field(pytree_node=False, default=1.0)
  hidden_weight: float = flax.struct.field(pytree_node=False, default=0.0)


def language_model_loss(
  model: Transformer,
  params: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  *,
  z_loss: float = 0.0,
  teacher: Teacher | None = None,
) -> LossSums:
  """Returns the training loss of a batch of packed rows, as sums over the batch's targets.

  Args:
    model: the model that is trained.
    params: parameters of the model.
    batch: `tokens` int32 [B, T + 1], of which the first T are inputs and the last T their targets. Optional:
      `segment_ids` int32 [B, T + 1], document ids: state and position are reset where the id changes, and the first
      token of a document is not a target; `row_weights` float32 [B], weights of the rows; `target_weights` float32
      [B, T + 1], the weight of each token as a target, 0 for tokens that are read and not learned.
    z_loss: weight of the squared logsumexp of the logits.
    teacher: the model to distil from, which reads the same batch; no gradient reaches the teacher. None: no teacher.
  """
  inputs = inputs_of(batch)
  read = read_streams if teacher is not None and teacher.hidden_weight else _read
  hidden_BTD, streams = read(model, params, *inputs)
  if teacher is None:
    return hidden_loss(model, params, hidden_BTD, batch, z_loss=z_loss)
  theirs_BTD, their_streams = read(teacher.model, teacher.params, *inputs)
  sums = hidden_loss(model, params, hidden_BTD, batch, z_loss=z_loss, teacher=teacher, theirs_BTD=theirs_BTD)
  if teacher.hidden_weight:
    error_BT = streams_error(model, streams, teacher.model, their_streams)
    added = teacher.hidden_weight * _weighted_sum(error_BT, _target_weights(batch))
    sums = dataclasses.replace(sums, loss=sums.loss + added)
  return sums


def hidden_loss(
  model: Transformer,
  params: Mapping[str, Any],
  hidden_BTD: jax.Array,
  batch: Mapping[str, jax.Array],
  *,
  z_loss: float = 0.0,
  teacher: Teacher | None = None,
  theirs_BTD: jax.Array | None = None,
) -> LossSums:
  """Computes `language_model_loss` from the hidden states of model and teacher, without the term of `hidden_weight`.

  Args:
    model: the model that is trained.
    params: parameters of the model, of which only the unembedding is read.
    hidden_BTD: [B, T, D], output of the model after the last norm.
    batch: as `language_model_loss` takes it.
    z_loss: weight of the squared logsumexp of the logits.
    teacher: the model to distil from; None: no teacher.
    theirs_BTD: [B, T, D], output of the teacher after the last norm; required with a teacher.
  """
  table = "embed_tokens" if model.config.tie_embeddings else "lm_head"

  def unembed(table_params, hidden):
    return model.apply({"params": {table: table_params}}, hidden, method="unembed")

  how: dict[str, Any] = {"z_loss": z_loss}
  if teacher is not None and teacher.weight:
    how |= {"teacher": (teacher.params[table], theirs_BTD), "teacher_weight": teacher.weight}
  return next_token_loss(unembed, params[table], hidden_BTD, batch["tokens"][:, 1:], _target_weights(batch), **how)


def attention_transfer_loss(
  model: Transformer, params: Mapping[str, Any], batch: Mapping[str, jax.Array], teacher: Teacher
) -> jax.Array:
  """Returns the weighted sum of `layer_losses.attention_error` over a batch's targets, a float32 scalar.

  The arguments are those of `language_model_loss`; model and teacher have to be stacked.

  Raises:
    ValueError: all of the model's layers have the teacher's mixers.
  """
  error_BT = attention_error(model, params, teacher.model, teacher.params, *inputs_of(batch))
  return _weighted_sum(error_BT, _target_weights(batch))


def inputs_of(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
  """Returns (tokens [B, T], segment ids [B, T] or None) of a batch, without the last token, which is only a target."""
  segment_ids = batch.get("segment_ids")
  return batch["tokens"][:, :-1], None if segment_ids is None else segment_ids[:, :-1]


def _weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
  return jnp.where(weights > 0, x * weights, 0).sum()


def _read(
  model: Transformer, params: Any, tokens: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, Streams]:
  """Runs a model, stacked or not; returns (hidden states, {}), since unlike `read_streams` it stores no activations."""
  return model.apply({"params": params}, tokens, segment_ids=segment_ids)[0], {}


def _target_weights(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns float32 [..., T]: the weight of the next token as a target times that of the row; 0 if it is no target."""
  weights = jnp.ones(batch["tokens"][..., 1:].shape, jnp.float32)
  if (segment_ids := batch.get("segment_ids")) is not None:
    weights *= segment_ids[..., 1:] == segment_ids[..., :-1]
  if (row_weights := batch.get("row_weights")) is not None:
    weights *= row_weights[..., None]
  if (target_weights := batch.get("target_weights")) is not None:
    weights *= target_weights[..., 1:]
  return weights


def count_targets(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns the weighted number of targets of a batch [..., T + 1], a float32 scalar >= 1; divide losses by it."""
  return jnp.maximum(_target_weights(batch).sum(), 1.0)


def next_token_loss(
  unembed: Unembed,
  params: Any,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  teacher: tuple[Any, jax.Array] | None = None,
  teacher_weight: float = 0.0,
  chunk: int = CHUNK_TOKENS,
) -> LossSums:
  """Returns `sum_t w_t ((1 - a) nll_t + a KL_t + z_loss * logsumexp_t^2)` as `LossSums`, summed over chunks of tokens.

  The gradient is computed in the forward pass, while the logits of a chunk are in memory: a chunk costs three products
  with the unembedding instead of the four of rematerialisation, with the same memory.

  Args:
    unembed: (params, hidden [B, C, D]) -> logits [B, C, vocabulary], float32.
    params: parameters of `unembed`; all leaves get gradients.
    hidden_BTD: [B, T, D], output of the model after the last norm.
    targets_BT: int [B, T], the token that follows each position.
    weights_BT: float [B, T], weights w of the targets; 0 where a target does not count. None means 1 everywhere.
    z_loss: weight of the squared logsumexp of the logits, 1e-4 in the paper's recipe.
    teacher: (parameters of `unembed`, hidden [B, T, D]) of the teacher in KL(teacher || model), without gradients.
    teacher_weight: a, the weight of the divergence; without a teacher a is 0.
    chunk: tokens per chunk and device.
  """
  weights = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT.astype(jnp.float32)
  how = _How(unembed, z_loss, teacher_weight if teacher else 0.0, chunk)
  loss, nll = _sums(how, params, hidden_BTD, targets_BT, weights, teacher or ())
  return LossSums(loss, nll, weights.sum())


class _How(NamedTuple):
  unembed: Unembed
  z_loss: float
  teacher_weight: float
  chunk: int


def chunks(x_BT: jax.Array, tokens: int) -> jax.Array:
  """Cuts [B, T, ...] along time into [chunks, B, positions, ...]; the last chunk is padded with zeros."""
  batch, time = x_BT.shape[:2]
  positions = min(max(tokens // batch, 1), time)
  x = jnp.pad(x_BT, [(0, 0), (0, -time % positions)] + [(0, 0)] * (x_BT.ndim - 2))
  return jnp.moveaxis(x.reshape(batch, -1, positions, *x.shape[2:]), 1, 0)


def _chunk_sums(how: _How, teacher_params, params, hidden_BCD, targets_BC, weights_BC, *teacher_BCD):
  # A padded position may hold NaN, which a weight of 0 does not remove (0 * NaN is NaN, in the gradients too): select
  # before any product.
  def selected(x_BCD):
    return jnp.where(weights_BC[..., None] > 0, x_BCD, jnp.zeros((), x_BCD.dtype))

  logits = how.unembed(params, selected(hidden_BCD))
  logits, targets, weights = (one_row_a_token(x, n) for x, n in ((logits, 1), (targets_BC, 0), (weights_BC, 0)))
  logsumexp = jax.nn.logsumexp(logits, axis=-1)
  nll = logsumexp - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  loss = nll
  if teacher_BCD:
    theirs = jax.nn.log_softmax(how.unembed(teacher_params[0], selected(teacher_BCD[0])).reshape(logits.shape))
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - logits), axis=-1) + logsumexp
    loss = (1 - how.teacher_weight) * nll + how.teacher_weight * divergence
  # `_weighted_sum` selects too: a target outside the vocabulary has a loss of NaN.
  loss, nll, square = (_weighted_sum(x, weights) for x in (loss, nll, jnp.square(logsumexp)))
  return loss + how.z_loss * square, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how: _How, params, hidden, targets, weights, teacher):
  def scan(whole, *rows):
    params, *teacher_params = whole

    def step(total, part):
      return jax.tree.map(jnp.add, total, _chunk_sums(how, teacher_params, params, *part)), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(step, (zero, zero), tuple(chunks(x, how.chunk) for x in rows))

  return sum_over_tokens(scan)((params, *teacher[:1]), hidden, targets, weights, *teacher[1:])[0]


def _sums_forward(how: _How, params, hidden, targets, weights, teacher):
  def scan(whole, *rows):
    params, *teacher_params = whole
    chunk_sums = functools.partial(_chunk_sums, how, teacher_params)
    value_and_grad = jax.value_and_grad(chunk_sums, argnums=(0, 1), has_aux=True)

    def step(carry, part):
      (loss, nll), grads = carry
      (part_loss, part_nll), (part_grads, hidden_grad) = value_and_grad(params, *part)
      return ((loss + part_loss, nll + part_nll), jax.tree.map(jnp.add, grads, part_grads)), hidden_grad

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    start = ((zero, zero), jax.tree.map(lambda x: at_least_float32(jnp.zeros_like(x)), params))
    sums, hidden_grads = jax.lax.scan(step, start, tuple(chunks(x, how.chunk) for x in rows))
    batch, time, width = rows[0].shape
    return sums, jnp.moveaxis(hidden_grads, 0, 1).reshape(batch, -1, width)[:, :time]

  whole, rows = (params, *teacher[:1]), (hidden, targets, weights, *teacher[1:])
  (sums, grads), hidden_grads = sum_over_tokens(scan)(whole, *rows)
  return sums, (jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params), hidden_grads)


def _sums_backward(how, residuals, cotangents):
  del how
  scale = cotangents[0]  # the cotangent of nll is dropped: nll is a metric
  params_grad, hidden_grad = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
  return params_grad, hidden_grad, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)
