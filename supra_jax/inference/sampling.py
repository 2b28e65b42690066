"""Draws the next token of each row: temperature, top-k, top-p, min-p, penalties and biases, all of them arrays.

Since all settings of a row are arrays, one compiled program serves rows with any settings. What a row draws depends on
its logits, its settings, its seed and the number of tokens that it has drawn, and on no other row.
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.schema import POSITIVE, AtLeast, AtMost, check

TOP = 20  # alternatives whose log-probabilities are known for each token
_RANKED = 512  # likeliest tokens that are ranked; all are ranked only where top_k or top_p reaches further
# Setting of generation_config.json that is not supported -> the value that switches it off; null switches it off too.
_NOT_SUPPORTED = {
  "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "no_repeat_ngram_size": 0, "num_beams": 1,
  "penalty_alpha": None,
}  # fmt: skip
_OF_FILE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token of a text is drawn from the logits; by default greedily.

  Biases and penalties change the logits first, of greedy texts too; then temperature, top_k, top_p and min_p follow in
  this order, as in the library transformers.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draws from the k likeliest tokens; 0 means all.
    top_p: draws from the fewest likeliest tokens whose probabilities add up to top_p; 1 means all.
    min_p: draws from tokens at least min_p times as likely as the likeliest; 0 means all.
    repetition_penalty: divides positive logits of tokens in the prompt or the text, and multiplies negative ones; 1
      changes nothing (CTRL, arXiv 1909.05858).
    presence_penalty: subtracted from the logits of tokens that were drawn before.
    frequency_penalty: subtracted from a token's logit for each time that the token was drawn.
    logit_bias: {token id: number added to its logit}.
    seed: seeds the draws.
  """

  temperature: Annotated[float, AtLeast(0)] = 0.0
  top_k: Annotated[int, AtLeast(0), AtMost(2**31 - 1)] = 0
  top_p: Annotated[float, POSITIVE, AtMost(1)] = 1.0
  min_p: Annotated[float, AtLeast(0), AtMost(1)] = 0.0
  repetition_penalty: Annotated[float, POSITIVE] = 1.0
  presence_penalty: Annotated[float, AtLeast(-100), AtMost(100)] = 0.0
  frequency_penalty: Annotated[float, AtLeast(-100), AtMost(100)] = 0.0
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  seed: Annotated[int, AtLeast(0), AtMost(2**32 - 1)] = 0

  @classmethod
  def of_checkpoint(cls, generation: Mapping[str, Any], **given: Any) -> Sampling:
    """Makes a Sampling from a generation_config.json; greedy unless the file has `do_sample` or a temperature is given.

    Args:
      generation: contents of generation_config.json, or empty. With `do_sample`, missing settings have the defaults of
        the library transformers: temperature 1, top_k 50, top_p 1. Without it, its settings are ignored but for
        repetition_penalty, and fields have the defaults of this class. A warning names settings that are not supported.
      **given: field -> value, which counts more than the file's and the defaults; None: not given.

    Raises:
      ValueError: a value is out of range or has the wrong type.
    """
    ignored = [f"{name}={generation[name]}" for name, off in _NOT_SUPPORTED.items() if generation.get(name, off) != off]
    if ignored:
      warnings.warn(f"generation_config.json asks for {', '.join(ignored)}, which is not supported.", stacklevel=3)
    draws = generation.get("do_sample") is True
    names = _OF_FILE if draws else ("repetition_penalty",)
    said = {name: generation[name] for name in names if generation.get(name) is not None}
    values: dict[str, Any] = ({"temperature": 1.0, "top_k": 50, "top_p": 1.0} if draws else {}) | said
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
      return cls(**values | chosen)
    except (TypeError, ValueError) as error:
      where = f"generation_config.json says {said}; " if said else ""
      raise ValueError(f"{where}{error}") from error

  @property
  def plain(self) -> bool:
    """Whether the likeliest token is taken, by the model's own logits."""
    changes = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
    return self.temperature == 0 and not changes

  def __post_init__(self):
    check(self)
    for token, bias in self.logit_bias.items():
      whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
      if not whole or token < 0 or not isinstance(bias, numbers.Real) or not abs(bias) < 1e38:
        raise ValueError(f"logit_bias has {token!r}: {bias!r}: wanted a token id and a finite number.")


@flax.struct.dataclass
class Draws:
  """How each row's next token is drawn, and what the row has drawn: arrays whose first axis is the batch.

  Attributes:
    temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32 [B], see `Sampling`.
    top_k: int32 [B].
    seed: uint32 [B].
    number: int32 [B], number of tokens drawn so far.
    bias: float32 [B, V].
    prompt: bool [B, V], whether a token is in the prompt.
    drawn: int32 [B, V], how often a token was drawn.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  presence_penalty: jax.Array
  frequency_penalty: jax.Array
  seed: jax.Array
  number: jax.Array
  bias: jax.Array
  prompt: jax.Array
  drawn: jax.Array

  @classmethod
  def of(cls, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], vocab_size: int) -> Draws:
    """Makes the Draws of rows that have drawn nothing, in numpy.

    Args:
      samplings: how each row draws.
      prompts: token ids that each row has read.
      vocab_size: V.

    Raises:
      ValueError: a bias is for a token that is not in the vocabulary.
    """
    batch = len(samplings)
    bias, prompt = np.zeros((batch, vocab_size), np.float32), np.zeros((batch, vocab_size), bool)
    for row, (sampling, ids) in enumerate(zip(samplings, prompts, strict=True)):
      if outside := [token for token in sampling.logit_bias if token >= vocab_size]:
        raise ValueError(f"logit_bias has the token {outside[0]}: the vocabulary is 0 to {vocab_size - 1}.")
      bias[row, list(sampling.logit_bias)] = list(sampling.logit_bias.values())
      prompt[row, np.asarray(ids, np.int64)] = True
    kinds = {"top_k": np.int32, "seed": np.uint32}
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]
    values: dict[str, Any] = {
      name: np.asarray([getattr(s, name) for s in samplings], kinds.get(name, np.float32)) for name in names
    }
    values |= {"number": np.zeros(batch, np.int32), "drawn": np.zeros((batch, vocab_size), np.int32)}
    return cls(**values | {"bias": bias, "prompt": prompt})

  def put(self, slots: jax.Array, other: Draws) -> Draws:
    """Returns these with row i of `other` in place of row `slots[i]`, for all i."""
    return jax.tree.map(lambda x, new: jnp.asarray(x).at[slots].set(new), self, other)


@flax.struct.dataclass
class Drawn:
  """Tokens that were drawn.

  Attributes:
    token: int32 [B].
    finite: bool [B], whether all logits that the token was drawn from are finite.
    logprob: float32 [B], log-probability of the token under the model's own logits, before any setting.
    top_tokens, top_logprobs: int32 and float32 [B, TOP], the likeliest tokens under them; zeros unless asked for.
  """

  token: jax.Array
  finite: jax.Array
  logprob: jax.Array
  top_tokens: jax.Array
  top_logprobs: jax.Array


def draw(logits_BV: jax.Array, draws: Draws, alternatives: jax.Array, plain: bool = False) -> tuple[Drawn, Draws]:
  """Draws one token per row.

  Args:
    logits_BV: float32 [B, V].
    draws: how.
    alternatives: bool [], whether `Drawn.top_tokens` are wanted.
    plain: whether all rows are greedy, without penalties, biases and alternatives; compiles in a fraction of the time.

  Returns:
    (what was drawn, the draws after it).
  """
  logits_BV = logits_BV.astype(jnp.float32)
  rows = jnp.arange(logits_BV.shape[0])
  norm = jax.nn.logsumexp(logits_BV, axis=-1)
  if plain:
    token = _likeliest(logits_BV)
    tops = jnp.zeros((len(rows), TOP), jnp.int32), jnp.zeros((len(rows), TOP), jnp.float32)
    return _counted(logits_BV, norm, token, tops, draws)
  changed = (draws.repetition_penalty != 1) | (draws.presence_penalty != 0) | (draws.frequency_penalty != 0)
  changed |= (draws.bias != 0).any(-1)
  adjusted = jax.lax.cond(changed.any(), _adjusted, lambda x, _: x, logits_BV, draws)
  greedy = _likeliest(adjusted)
  cold = draws.temperature == 0
  token = jax.lax.cond(cold.all(), lambda *_: greedy, _random, adjusted, draws)
  token = jnp.where(cold, greedy, token)

  def likeliest(logits_BV):
    values, tokens = jax.lax.top_k(logits_BV, min(TOP, logits_BV.shape[1]))
    return _padded(tokens.astype(jnp.int32)), _padded(values - norm[:, None])

  def none(logits_BV):
    return jnp.zeros((logits_BV.shape[0], TOP), jnp.int32), jnp.zeros((logits_BV.shape[0], TOP), jnp.float32)

  tops = jax.lax.cond(alternatives, likeliest, none, logits_BV)
  return _counted(logits_BV, norm, token, tops, draws)


def _counted(logits_BV, norm_B, token_B, tops, draws: Draws) -> tuple[Drawn, Draws]:
  rows = jnp.arange(logits_BV.shape[0])
  drawn = Drawn(token_B, jnp.isfinite(logits_BV).all(-1), logits_BV[rows, token_B] - norm_B, *tops)
  return drawn, dataclasses.replace(draws, number=draws.number + 1, drawn=draws.drawn.at[rows, token_B].add(1))


def _likeliest(logits_BV: jax.Array) -> jax.Array:
  """Returns the first of the largest logits of each row; any token where there are NaN.

  As argmax, which takes several times as long on a CPU.
  """
  vocab = logits_BV.shape[1]
  largest = logits_BV == logits_BV.max(-1, keepdims=True)
  return jnp.minimum(jnp.where(largest, jnp.arange(vocab, dtype=jnp.int32), vocab).min(-1), vocab - 1)


def _padded(x_BN: jax.Array) -> jax.Array:
  return jnp.pad(x_BN, ((0, 0), (0, TOP - x_BN.shape[1])))


def _adjusted(logits_BV: jax.Array, draws: Draws) -> jax.Array:
  penalty = draws.repetition_penalty[:, None]
  penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  logits = jnp.where(draws.prompt | (draws.drawn > 0), penalised, logits_BV) + draws.bias
  count = draws.drawn.astype(jnp.float32)
  return logits - draws.presence_penalty[:, None] * (count > 0) - draws.frequency_penalty[:, None] * count


def _random(logits_BV: jax.Array, draws: Draws) -> jax.Array:
  scaled = logits_BV / jnp.where(draws.temperature == 0, 1, draws.temperature)[:, None]
  cut = (draws.top_k > 0) | (draws.top_p < 1)
  none = jnp.full(len(cut), -jnp.inf, jnp.float32)
  floor = jax.lax.cond(cut.any(), _threshold, lambda *_: none, scaled, draws.top_k, draws.top_p)
  floor = jnp.where(cut, floor, none)
  floor = jnp.maximum(floor, scaled.max(-1) + jnp.log(draws.min_p))
  kept = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)

  def one(seed, number, logits_V):
    return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), number), logits_V)

  return jax.vmap(one)(draws.seed, draws.number, kept).astype(jnp.int32)


def _threshold(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Returns the least logit that top_k and top_p keep, [B]; with equal logits more than k tokens may have it."""
  vocab = logits_BV.shape[1]
  count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)

  def of(ranked_BN: jax.Array, norm_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    # (threshold, whether the ranked tokens reach it)
    inside = jnp.arange(ranked_BN.shape[1]) < count[:, None]
    chance = jnp.where(inside, jnp.exp(ranked_BN - norm_B[:, None]), 0)
    total = jnp.cumsum(chance, axis=-1)
    kept = jnp.maximum((inside & (total - chance < top_p[:, None])).sum(-1), 1)
    reached = (kept < ranked_BN.shape[1]) | (count <= ranked_BN.shape[1])
    return jnp.take_along_axis(ranked_BN, kept[:, None] - 1, axis=-1)[:, 0], reached

  few, _ = jax.lax.top_k(logits_BV, min(_RANKED, vocab))
  inside = jnp.arange(few.shape[1]) < count[:, None]
  norm = jnp.where(
    count <= few.shape[1],
    jax.nn.logsumexp(jnp.where(inside, few, -jnp.inf), axis=-1),
    jax.nn.logsumexp(logits_BV, axis=-1),
  )
  threshold, reached = of(few, norm)
  # The norm of k between the ranked tokens and all of them is that of a full ranking.
  reached &= (count <= few.shape[1]) | (count == vocab)

  def full(logits_BV):
    ranked = jnp.sort(logits_BV, axis=-1, descending=True)
    inside = jnp.arange(vocab) < count[:, None]
    return of(ranked, jax.nn.logsumexp(jnp.where(inside, ranked, -jnp.inf), axis=-1))[0]

  return jnp.where(reached, threshold, jax.lax.cond(reached.all(), lambda x: threshold, full, logits_BV))
