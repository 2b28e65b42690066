"""From what users ask for, prompts and arguments for one or all of them, to the requests of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
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
    text = text.tolist() if isinstance(text, np.ndarray | jax.Array) else text
    is_list = isinstance(text, Iterable) and not isinstance(text, bytes)
    given = list(text) if is_list else []
    if (
      isinstance(text, bytes)
      or not isinstance(text, Iterable)
      or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in given)
    ):
      raise ValueError(f"A prompt is {str(text)[:40]!r}: wanted a text, or token ids.")
    ids = [int(i) for i in given]
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


def from_state(state: State) -> dict[str, Any]:
  """Returns the fields of a `Request` that goes on from a state of one row."""
  return {"state": state.decode, "hidden": state.hidden, "read": state.tokens[0]}


def requests(
  prompts: Sequence[list[int]],
  decoders: Sequence[StreamDecoder | NoText],
  states: Sequence[State | None],
  *,
  config: ModelConfig,
  generation: Mapping[str, Any],
  keep: bool = True,
  max_new_tokens: Any = 100,
  stop: Any = (),
  stop_ids: Any = (),
  **sampling: Any,
) -> dict[Request, TextBuilder]:
  """Returns a request for each prompt, with the builder of its text.

  Args:
    prompts: token ids.
    decoders: decoder of each text.
    states: what the model has read before each prompt, of one row; None: nothing.
    config: the model's config.
    generation: contents of generation_config.json, or empty.
    keep: see `TextBuilder`.
    max_new_tokens, stop, stop_ids, **sampling: see `LM.complete`.

  Raises:
    ValueError: a value is out of range, or a list has not one value for each prompt.
  """
  count = len(prompts)
  stops = _lists("stop", stop, str, count)
  ends = _lists("stop_ids", stop_ids, int | np.integer, count)
  most = _each("max_new_tokens", max_new_tokens, count)
  values = {name: _each(name, value, count) for name, value in sampling.items() if value is not None}
  if "seed" not in values:
    values["seed"] = list(range(count))
  elif isinstance(sampling["seed"], int | np.integer) and 0 <= sampling["seed"] < 2**32:
    values["seed"] = [(sampling["seed"] + i) % 2**32 for i in range(count)]
  texts = {}
  for i, (ids, decoder) in enumerate(zip(prompts, decoders, strict=True)):
    state = states[i]
    before = {} if state is None else from_state(state)
    how = Sampling.of_checkpoint(generation, **{name: value[i] for name, value in values.items()})
    if not isinstance(most[i], int | np.integer) or most[i] < 0:
      raise ValueError(f"max_new_tokens={most[i]!r}: wanted a whole number, 0 or more.")
    request = Request(ids, how, most[i], **before)
    own = {*config.eos_token_ids, *ends[i]}
    texts[request] = TextBuilder(decoder, most=most[i], stop=stops[i], stop_ids=own, keep=keep)
  return texts


def _each(name: str, value: Any, count: int) -> list[Any]:
  """Returns a value for each of `count` prompts, of one for all or of any iterable with one each."""
  value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
    return [value] * count
  values = list(value)
  if len(values) != count:
    raise ValueError(f"{name} has {len(values)} values for {count} prompts.")
  return values


def _lists(name: str, value: Any, kind: Any, count: int) -> list[tuple[Any, ...]]:
  """Returns a tuple for each of `count` prompts, of an item, of items for all, or of items for each."""
  value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
  if not isinstance(value, kind | Iterable | None):
    raise ValueError(f"{name}={value!r}: wanted {'texts' if kind is str else 'token ids'}.")
  held = [] if value is None else [value] if isinstance(value, kind) else list(value)
  each = [held] * count if all(isinstance(item, kind) for item in held) else _each(name, held, count)
  made = [() if items is None else (items,) if isinstance(items, kind) else tuple(items) for items in each]
  if wrong := [item for items in made for item in items if not isinstance(item, kind)]:
    raise ValueError(f"{name} holds {wrong[0]!r}: wanted {'texts' if kind is str else 'token ids'}.")
  return made


ARGUMENTS = {"max_new_tokens", "stop", "stop_ids", *(field.name for field in dataclasses.fields(Sampling))}
