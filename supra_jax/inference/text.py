"""From the tokens of a generated text to its characters, and where the text stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from supra_jax.data.tokenizer import StreamDecoder
from supra_jax.inference.engine import Token
from supra_jax.inference.state import State


@dataclasses.dataclass(frozen=True)
class Completion:
  """A generated text.

  Attributes:
    text: the text, without the stop string that ended it.
    tokens: ids of all tokens that were drawn, with the one that ended the text.
    logprobs: log-probability of each token under the model, in nats.
    top_logprobs: for each token {id: log-probability} of the likeliest tokens in its place; empty unless asked for.
    finish: why the text ended: "stop", at a stop string or an end-of-text token, or "length".
    state: what the model remembers after the last token; None unless asked for.
  """

  text: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  top_logprobs: tuple[Mapping[int, float], ...]
  finish: Literal["stop", "length"]
  state: State | None = None


class NoText:
  """In place of a decoder, for a model without a tokenizer: its texts are empty."""

  def push(self, token_id: int) -> str:
    del token_id
    return ""

  def flush(self) -> str:
    return ""


class TextBuilder:
  """Builds a text of tokens that come one at a time; holds back what may become a stop string.

  Attributes:
    finish: why the text has ended; None while it has not.
    last: the last token; None before the first.
  """

  def __init__(
    self,
    decoder: StreamDecoder | NoText,
    *,
    most: int,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    keep: bool = True,
  ):
    """Begins a text.

    Args:
      decoder: decodes the ids.
      most: number of tokens after which the text ends.
      stop: strings before which the text ends, even if they lie across tokens.
      stop_ids: token ids that end the text and are no part of it.
      keep: whether tokens and text are kept, for `tokens` and `completion`. Without them, memory does not grow.

    Raises:
      ValueError: a stop string is empty.
    """
    if not all(stop):
      raise ValueError(f"stop={list(stop)!r}: an empty string is everywhere.")
    self._decoder, self._most, self._stop, self._stop_ids = decoder, most, tuple(stop), stop_ids
    self._held = ""
    self._pieces: list[str] = []
    self._tokens: list[Token] = []
    self._keep, self._count = keep, 0
    self.last: Token | None = None
    self.finish: Literal["stop", "length"] | None = "length" if most == 0 else None

  @property
  def tokens(self) -> list[int]:
    """Ids of all tokens so far."""
    return [token.id for token in self._tokens]

  def push(self, token: Token) -> str:
    """Adds a token; returns the text that is certain now, empty if more has to be known."""
    self.last, self._count = token, self._count + 1
    if self._keep:
      self._tokens.append(token)
    text = self._held
    if token.id in self._stop_ids:
      self.finish = "stop"
    else:
      text += self._decoder.push(token.id)
      if self._count == self._most:
        self.finish = "length"
    if self.finish:
      text += self._decoder.flush()
    ends = [at for at in (text.find(string) for string in self._stop) if at >= 0]
    if ends:
      self.finish, text = "stop", text[: min(ends)]
    held = 0 if self.finish else self._possible(text)
    certain, self._held = text[: len(text) - held], text[len(text) - held :]
    if self._keep:
      self._pieces.append(certain)
    return certain

  def _possible(self, text: str) -> int:
    """Returns the length of the longest end of the text with which a stop string begins."""
    longest = max((len(string) - 1 for string in self._stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
      if any(string.startswith(text[-length:]) for string in self._stop):
        return length
    return 0

  def completion(self, logprobs: int, state: State | None) -> Completion:
    """Returns the text, once `finish` is not None, with so many of the likeliest tokens in each place, and a state."""
    assert self.finish is not None
    tops = [dict(list(token.top.items())[:logprobs]) for token in self._tokens] if logprobs else []
    chances = tuple(token.logprob for token in self._tokens)
    return Completion("".join(self._pieces), tuple(self.tokens), chances, tuple(tops), self.finish, state)
