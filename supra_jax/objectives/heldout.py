"""Computes the held-out loss of a model: negative log-likelihood in nats per token, and perplexity."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import LossSums, language_model_loss


@functools.partial(jax.jit, static_argnums=0)
def loss_sums(model: Transformer, params, batch) -> LossSums:
  """Returns `objectives.losses.language_model_loss` without teacher and z-loss, compiled."""
  return language_model_loss(model, params, batch)


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
