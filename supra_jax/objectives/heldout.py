"""Computes the held-out loss of a model: negative log-likelihood in nats per token, and perplexity."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.xla_cpu import one_row_a_token
from supra_jax.model.transformer import DecodeState, Transformer
from supra_jax.objectives.losses import CHUNK_TOKENS, LossSums, chunks, language_model_loss


@functools.partial(jax.jit, static_argnums=0)
def loss_sums(model: Transformer, params, batch) -> LossSums:
  """Returns `objectives.losses.language_model_loss` without teacher and z-loss, compiled."""
  return language_model_loss(model, params, batch)


def log_likelihoods(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the log-likelihood of each target [...], in nats, of logits [..., vocabulary]."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def token_nll(
  model: Transformer,
  params,
  tokens_BT: jax.Array,
  state: DecodeState | None = None,
  lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, DecodeState | None]:
  """Returns the negative log-likelihood of each token; logits of a chunk of tokens at a time are in memory.

  Args:
    model: the model, not stacked.
    params: parameters of the model.
    tokens_BT: int32 [B, T + 1], of which the first T are read and the last T are scored.
    state: the state to continue from, with room for T tokens; it is donated. None: a fresh one.
    lengths_B: number of tokens of each row that are read; None: T. What is scored behind them is meaningless.

  Returns:
    (float32 [B, T], nats of each scored token; the state after the tokens that were read, None without a state).
  """
  bound = model.bind({"params": params})
  hidden_BTD, after = bound(tokens_BT[:, :-1], state, lengths=lengths_B)
  targets_BT = tokens_BT[:, 1:]

  def nll_of(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    hidden_BCD, targets_BC = part
    logits = one_row_a_token(bound.unembed(hidden_BCD), 1)
    return -log_likelihoods(logits, targets_BC.reshape(-1)).reshape(targets_BC.shape)

  nll = jax.lax.map(nll_of, (chunks(hidden_BTD, CHUNK_TOKENS), chunks(targets_BT, CHUNK_TOKENS)))
  batch, time = targets_BT.shape
  return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :time], None if state is None else after


def mean_nll(model: Transformer, params: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]) -> float:
  """Returns the mean negative log-likelihood of all targets of the batches, in nats per token.

  Args:
    model: the model.
    params: parameters of the model.
    batches: batches of packed rows, as `objectives.losses.language_model_loss` takes them.

  Raises:
    ValueError: no batch has a target.
  """
  nll = weight = 0.0
  for batch in batches:
    sums = loss_sums(model, params, batch)
    nll, weight = nll + float(sums.nll), weight + float(sums.weight)
  if not weight:
    raise ValueError("Nothing to evaluate: no batch has a target.")
  return nll / weight


def perplexity(nll: float) -> float:
  """Returns the perplexity exp(nll) of a loss `nll` in nats per token; infinity where float64 would overflow."""
  return math.exp(nll) if nll < 709 else math.inf
