"""Conversations to train on: their token ids, and which of these a model is to learn: what the assistant says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from supra_jax.data.chat_template import Message
from supra_jax.data.tokenizer import Tokenizer

ASSISTANT = "assistant"
# Roles of ShareGPT's records, {"from": ..., "value": ...}.
_ROLES = {"human": "user", "gpt": ASSISTANT}


class Conversation(NamedTuple):
  """A conversation as tokens.

  Attributes:
    ids: the token ids of the whole conversation.
    learned: bool, for each whether a model is to learn it.
    note: what a user should know of all conversations like this one; empty if there is nothing.
  """

  ids: list[int]
  learned: np.ndarray
  note: str


def messages_of(value: Any) -> list[Message]:
  """Returns the messages of a record: a list of {"role": ..., "content": ...}, or of {"from": ..., "value": ...}.

  Raises:
    ValueError: the value is something else, or no message but perhaps the first is the assistant's.
  """
  if not isinstance(value, list) or not value:
    raise ValueError("wanted a list of messages")
  messages = []
  for number, message in enumerate(value):
    if isinstance(message, Mapping) and "role" not in message and {"from", "value"} <= message.keys():
      message = {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
      raise ValueError(f"message {number} has no role or no content")
    messages.append(message)
  if not any(message["role"] == ASSISTANT for message in messages[1:]):
    raise ValueError(f"no message of the {ASSISTANT} answers another")
  return messages


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
  """Encodes a conversation; a model learns the answers of the assistant, each with the token that ends it.

  An answer is what stands between the conversation before it, rendered with the beginning of an answer, and the
  conversation after it. It ends with its last special token; all of it is learned if it has none. Where the template
  renders earlier answers otherwise than the last one, as those do that leave out what was thought, the last one alone
  is learned. The begin-of-text id is the template's own matter.

  Args:
    tokenizer: has the chat template.
    messages: what `messages_of` returns.

  Raises:
    ValueError: the template refuses the messages, or an answer has no token.
    TemplateUnfit: the template renders what comes before the last answer otherwise once the answer is there.
  """
  whole = tokenizer.encode_chat(messages, reply=False)
  answers = [number for number, message in enumerate(messages) if number and message["role"] == ASSISTANT]
  befores = [tokenizer.encode_chat(messages[:number]) for number in answers]
  untils = [tokenizer.encode_chat(messages[: number + 1], reply=False) for number in answers]
  spans = [_answer(tokenizer, *parts, whole) for parts in zip(befores, untils, strict=True)]
  if spans[-1] is None:
    seen = whole[: _alike(befores[-1], whole) + 8]
    raise TemplateUnfit(
      "chat_template.jinja renders what comes before an answer otherwise once the answer is there, so that it cannot "
      f"be told from what it answers. Before: {_end(tokenizer, befores[-1])}; in the whole: {_end(tokenizer, seen)}. "
      "Render the conversations yourself and pack them as text, with --text_key, or take another template."
    )
  rewritten = None in spans
  spans = spans[-1:] if rewritten else spans
  learned = np.zeros(len(whole), bool)
  for begin, end in filter(None, spans):
    learned[begin:end] = True
  strangers = {whole[end - 1] for _, end in filter(None, spans)} - set(tokenizer.eos_ids)
  note = ""
  if rewritten:
    note = "The chat template renders earlier answers otherwise than the last one: the last one alone is learned."
  elif strangers:
    named = ", ".join(sorted(repr(tokenizer.decode([i], keep_special=True)) for i in strangers))
    note = f"Answers end with {named}, which ends no text of this model: generation does not stop there by itself."
  return Conversation(whole, learned, note)


def _answer(
  tokenizer: Tokenizer, before: Sequence[int], until: Sequence[int], whole: Sequence[int]
) -> tuple[int, int] | None:
  """Returns where an answer begins and ends in a conversation.

  Args:
    tokenizer: says which tokens are special.
    before: the conversation before the answer, with the beginning of an answer.
    until: the conversation until the answer, included.
    whole: the whole conversation.

  Returns:
    (begin, end); None if the whole does not begin with both.
  """
  begin = len(before)
  special = [at for at in range(begin, len(until)) if tokenizer.is_special(until[at])]
  end = special[-1] + 1 if special else len(until)
  return (begin, end) if begin < end and _alike(before, whole) == begin and _alike(until, whole) >= end else None


class TemplateUnfit(ValueError):
  """A chat template from whose text answers cannot be told."""


def _alike(ids: Sequence[int], others: Sequence[int]) -> int:
  """Returns how many ids two lists begin with alike."""
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def _end(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  return repr(tokenizer.decode(ids[-24:], keep_special=True))
