"""From what users ask for, prompts and arguments for one or all of them, to the requests of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from supra_jax.data.tokenizer import StreamDecoder, Tokenizer
from supra_jax.inference.engine import Request
from supra_jax.inference.sampling import Sampling
from supra_jax.inference.state import State
from supra_jax.inference.text import NoText, TextBuilder
from supra_jax.model.config import ModelConfig


def token_ids(
  text: str | Sequence[int], tokenizer: Tokenizer | None, config: ModelConfig, *, continues: bool
) -> list[int]:
  """Returns the token ids of a prompt; of an empty one the token that begins a text, if the model has one.

  Args:
    text: a text, or its token ids, which are checked.
    tokenizer: the model's tokenizer; None if it has none.
    config: the model's config.
    continues: whether the prompt follows what was read before: it then gets no begin-of-text token and may be empty.

  Raises:
    ValueError: a token is not in the vocabulary, or there is a text and no tokenizer.
  """
  if not isinstance(text, str):
    ids = [int(i) for i in text]
    if outside := [i for i in ids if not 0 <= i < config.vocab_size]:
      raise ValueError(f"Token {outside[0]} is not in the vocabulary, 0 to {config.vocab_size - 1}.")
  elif tokenizer is None:
    raise ValueError("This checkpoint has no tokenizer: give token ids in place of a text.")
  else:
    ids = tokenizer.encode(text, continues=continues)
  if not ids and not continues:
    start = [config.bos_token_id, *config.eos_token_ids]
    ids = [i for i in start if i is not None][:1]
  return ids


def requests(
  prompts: Sequence[list[int]],
  decoders: Sequence[StreamDecoder | NoText],
  state: State | None,
  *,
  generation: Mapping[str, Any],
  stop_ids: Collection[int],
  keep: bool = True,
  max_new_tokens: int | Sequence[int] = 100,
  stop: str | Sequence[str] = (),
  **sampling: Any,
) -> dict[Request, TextBuilder]:
  """Returns a request for each prompt, with the builder of its text.

  Args:
    prompts: token ids.
    decoders: decoder of each text.
    state: what the model has read before, of one row or as many as prompts; None: nothing.
    generation: contents of generation_config.json, or empty.
    stop_ids: token ids that end a text.
    keep: see `TextBuilder`.
    max_new_tokens, stop, **sampling: see `LM.complete`.

  Raises:
    TypeError: a field is not one of `Sampling`.
    ValueError: a value is out of range, or a list has not one value for each prompt.
  """
  count = len(prompts)
  if unknown := sampling.keys() - {field.name for field in dataclasses.fields(Sampling)}:
    raise TypeError(f"Unknown arguments: {', '.join(sorted(unknown))}.")
  if isinstance(stop, str):
    stop = (stop,)
  most = _each("max_new_tokens", max_new_tokens, count)
  values = {name: _each(name, value, count) for name, value in sampling.items() if value is not None}
  if "seed" in values and not isinstance(sampling["seed"], list | tuple):
    values["seed"] = [(sampling["seed"] + i) % 2**32 for i in range(count)]
  elif "seed" not in values:
    values["seed"] = list(range(count))
  texts = {}
  for i, (ids, decoder) in enumerate(zip(prompts, decoders, strict=True)):
    before: dict[str, Any] = {}
    if state is not None:
      row = state.of(i)
      before = {"state": row.decode, "hidden": row.hidden, "read": row.tokens[0]}
    how = Sampling.of_checkpoint(generation, **{name: value[i] for name, value in values.items()})
    if most[i] < 0 or not isinstance(most[i], int | np.integer):
      raise ValueError(f"max_new_tokens={most[i]!r}: wanted a whole number, 0 or more.")
    request = Request(ids, how, most[i], **before)
    texts[request] = TextBuilder(decoder, most=most[i], stop=stop, stop_ids=stop_ids, keep=keep)
  return texts


def _each(name: str, value: Any, count: int) -> list[Any]:
  """Returns a value for each of `count` prompts."""
  if not isinstance(value, list | tuple):
    return [value] * count
  if len(value) != count:
    raise ValueError(f"{name} has {len(value)} values for {count} prompts.")
  return list(value)
