"""Sampling of the next token: temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from supra_jax.core.schema import POSITIVE, AtLeast, AtMost, check

# Setting of generation_config.json that is not supported -> the value that switches it off; null switches it off too.
_NOT_SUPPORTED = {
  "repetition_penalty": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
  "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn from the logits; by default greedily.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draws from the k likeliest tokens; 0 means all.
    top_p: draws from the fewest likeliest tokens whose probabilities add up to top_p; 1 means all.
  """

  temperature: Annotated[float, AtLeast(0)] = 0.0
  top_k: Annotated[int, AtLeast(0)] = 0
  top_p: Annotated[float, POSITIVE, AtMost(1)] = 1.0

  @classmethod
  def of_checkpoint(cls, generation: Mapping[str, Any], **given: float | None) -> Sampling:
    """Makes a Sampling from a generation_config.json; greedy unless the file has `do_sample` or a temperature is given.

    Args:
      generation: contents of generation_config.json, or empty. With `do_sample`, missing settings have the defaults of
        the library transformers: temperature 1, top_k 50, top_p 1. Without it, its settings are ignored, and fields
        have the defaults of this class. A warning names settings that are not supported.
      **given: field -> value, which counts more than the file's and the defaults; None: not given.

    Raises:
      ValueError: a value is out of range or has the wrong type.
    """
    ignored = [f"{name}={generation[name]}" for name, off in _NOT_SUPPORTED.items() if generation.get(name, off) != off]
    if ignored:
      warnings.warn(f"generation_config.json asks for {', '.join(ignored)}, which is not supported.", stacklevel=3)
    values: dict[str, Any] = {}
    if generation.get("do_sample") is True:
      said = {name: generation[name] for name in ("temperature", "top_k", "top_p") if generation.get(name) is not None}
      values = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | said
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
      return cls(**values | chosen)
    except (TypeError, ValueError) as error:
      where = f"generation_config.json says {said}; " if values else ""
      raise ValueError(f"{where}{error}") from error

  def __post_init__(self):
    check(self)


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token per row of logits.

  Args:
    logits_BV: float [B, V].
    key: key of jax.random.
    sampling: how tokens are drawn.

  Returns:
    The tokens, int32 [B].
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits = logits_BV / sampling.temperature
  if sampling.top_k:
    kept = min(sampling.top_k, logits.shape[-1])
    logits = jnp.where(logits >= jax.lax.top_k(logits, kept)[0][..., -1:], logits, -jnp.inf)
  if sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
    last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
    logits = jnp.where(logits >= jnp.take_along_axis(ranked, last, axis=-1), logits, -jnp.inf)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
