"""Evaluates a model: mean negative log-likelihood of a text, and log-likelihoods of given continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from supra_jax.evaluation.perplexity import evaluate_text, text_loss
from supra_jax.evaluation.scoring import Text, scores
from supra_jax.inference.lm import LM


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
  texts = [Text((*context, *continuation), len(context)) for context, continuation in requests]
  return scores(lm, texts)[0]
