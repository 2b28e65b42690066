"""Evaluates a model: mean negative log-likelihood of a text, and log-likelihoods of given continuations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from supra_jax.core.sharding import on_mesh
from supra_jax.evaluation.perplexity import evaluate_text, text_loss
from supra_jax.inference.decode import round_up_length
from supra_jax.inference.lm import LM
from supra_jax.model.finite import NotFiniteError, not_finite

SCORED_TOKENS = 2048  # tokens per batch of continuations, contexts and padding included


def evaluate(lm: LM, text: str, **how: Any) -> tuple[float, int]:
  """Returns (mean negative log-likelihood in nats per token, number of scored tokens) of the text in files.

  For the arguments and errors see `perplexity.evaluate_text`, which returns the loss of each token.
  """
  loss = evaluate_text(lm, text, **how)
  return loss.mean, loss.targets


def text_nll(lm: LM, tokens: Sequence[int], **how: Any) -> tuple[float, int]:
  """Returns (mean negative log-likelihood in nats per token, number of scored tokens) of a text.

  For the arguments and errors see `perplexity.text_loss`, which returns the loss of each token.
  """
  loss = text_loss(lm, tokens, **how)
  return loss.mean, loss.targets


@functools.partial(jax.jit, static_argnums=0)
def _continuation_scores(model, params, tokens_BT, lengths_B, first_B):
  """Scores the tokens at positions [first, length) of each row.

  Returns:
    (sum of the tokens' log-likelihoods, float32 [B]; whether each token is the likeliest at its position, bool [B]).
  """
  logits, _ = model.apply({"params": params}, tokens_BT[:, :-1], lengths=lengths_B - 1, method="logits")
  targets = tokens_BT[:, 1:, None]
  chosen = jax.numpy.take_along_axis(logits, targets, axis=-1)[..., 0]
  position = jax.numpy.arange(1, tokens_BT.shape[1])
  counted = (position >= first_B[:, None]) & (position < lengths_B[:, None])
  loglikelihood = jax.numpy.where(counted, chosen - jax.nn.logsumexp(logits, axis=-1), 0).sum(-1)
  greedy = jax.numpy.where(counted, logits.argmax(-1) == targets[..., 0], True).all(-1)
  return loglikelihood, greedy


def loglikelihoods(lm: LM, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
  """Returns the log-likelihoods of continuations, as defined by `loglikelihood` of lm-evaluation-harness.

  Args:
    lm: the model.
    requests: pairs (context, continuation) of token ids; neither may be empty.

  Returns:
    For each request, in order: the sum of the log-likelihoods of the continuation's tokens in nats, and whether greedy
    decoding would produce the continuation.

  Raises:
    NotFiniteError: logits are not finite; the message names the request, by its index, and the first token after which
      logits are not finite.
    ValueError: a context or a continuation is empty.
  """
  rows = [([*context, *continuation], len(context)) for context, continuation in requests]
  if any(not first or first == len(row) for row, first in rows):
    raise ValueError("A context or a continuation is empty: wanted at least one token of each.")
  results: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
  by_length: dict[int, list[int]] = {}
  for i, (row, _) in enumerate(rows):
    by_length.setdefault(round_up_length(len(row)), []).append(i)
  for width, members in sorted(by_length.items()):
    size = max(SCORED_TOKENS // width, 1)
    for start in range(0, len(members), size):
      part = members[start : start + size]
      tokens = np.zeros((size, width), np.int32)
      lengths, first = np.full(size, 2), np.full(size, 1)
      for slot, i in enumerate(part):
        row, first[slot] = rows[i]
        tokens[slot, : len(row)], lengths[slot] = row, len(row)
      with on_mesh(lm.mesh):
        scores, greedy = _continuation_scores(lm.model, lm.params, tokens, lengths, first)
      for i, score, is_greedy in zip(part, np.asarray(scores), np.asarray(greedy), strict=False):
        if not math.isfinite(score):
          raise NotFiniteError(f"Request {i}: {not_finite(lm.model, lm.params, [rows[i][0]])}")
        results[i] = (float(score), bool(is_greedy))
  return results
