"""Evaluates a model: mean negative log-likelihood of a text, and log-likelihoods of given continuations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from supra_jax.core.sharding import on_mesh
from supra_jax.data.text import read_documents
from supra_jax.evaluation.scoring import Text, scores
from supra_jax.inference.lm import LM
from supra_jax.model.finite import not_finite
from supra_jax.objectives.heldout import loss_sums


def evaluate(
  lm: LM, text: str, *, text_key: str = "text", sequence_length: int = 1024, max_tokens: int = 0
) -> tuple[float, int]:
  """Returns the mean negative log-likelihood of the text in files, cut into pieces as in `text_nll`.

  Args:
    lm: the model, with its tokenizer.
    text: glob of .txt, .jsonl[.gz|.zst] or .parquet files, or `pydoc:topics`, as `data.text.find_files` takes it.
    text_key: the key of a JSON line, or the column of a parquet file, that holds the text.
    sequence_length: tokens per piece, at least 2, see `text_nll`.
    max_tokens: number of tokens to read, from the start of the text; 0 means all.

  Returns:
    (mean negative log-likelihood in nats per token, number of targets).

  Raises:
    FileNotFoundError: no file matches.
    NotFiniteError: as in `text_nll`.
    ValueError: the text, or `max_tokens`, is less than one piece; a file cannot be read; or the model has no tokenizer.
  """
  if lm.tokenizer is None:
    raise ValueError(
      "This checkpoint has no tokenizer to read text with: use supra_jax.evaluation.likelihood.text_nll with token ids."
    )
  if 0 < max_tokens < sequence_length:
    raise ValueError(f"max_tokens={max_tokens} does not fill one piece: sequence_length={sequence_length}.")
  documents = (lm.tokenizer.encode(document, bos=False) for document in read_documents(text, text_key))
  tokens = list(itertools.islice(itertools.chain.from_iterable(documents), max_tokens or None))
  return text_nll(lm, tokens, sequence_length=sequence_length)


def text_nll(lm: LM, tokens: Sequence[int], *, sequence_length: int = 1024, batch_size: int = 1) -> tuple[float, int]:
  """Returns the mean negative log-likelihood of a text, cut into pieces that the model reads from a fresh state each.

  Args:
    lm: the model.
    tokens: token ids of the text; an incomplete last piece is left out.
    sequence_length: tokens per piece, at least 2; all tokens of a piece but the first are targets.
    batch_size: number of pieces that the model reads at a time.

  Returns:
    (mean negative log-likelihood in nats per token, number of targets).

  Raises:
    NotFiniteError: logits are not finite; the message names the first token after which they are not.
    ValueError: the text does not fill one piece.
  """
  if sequence_length < 2:
    raise ValueError(f"sequence_length={sequence_length}: wanted at least 2, the first of which is no target.")
  count = len(tokens) // sequence_length
  if not count:
    raise ValueError(f"The text has {len(tokens)} tokens, fewer than one piece of {sequence_length}.")
  rows = np.asarray(tokens[: count * sequence_length], np.int32).reshape(count, sequence_length)
  nll = 0.0
  for first in range(0, count, batch_size):
    batch = rows[first : first + batch_size]
    with on_mesh(lm.mesh):
      nll += float(loss_sums(lm.model, lm.params, {"tokens": batch}).nll)
    if not math.isfinite(nll):
      raise not_finite(lm.model, lm.params, batch.tolist(), before=first * sequence_length)
  targets = count * (sequence_length - 1)
  return nll / targets, targets


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
