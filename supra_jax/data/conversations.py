"""Conversations to train on: their token ids, and which of these a model is to learn: what the assistant says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from supra_jax.data.chat_template import Message
from supra_jax.data.tokenizer import Tokenizer

ASSISTANT = "assistant"
# Roles of ShareGPT's records, {"from": ..., "value": ...}.
_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}


class Talk(NamedTuple):
  """A conversation as it is recorded.

  Attributes:
    messages: what `messages_of` returns.
    tools: the tools that the assistant may call, in the form that the chat template wants; None: none.
  """

  messages: list[Message]
  tools: Any = None


class Conversation(NamedTuple):
  """A conversation as tokens.

  Attributes:
    ids: the token ids of the conversation up to the last answer.
    learned: bool, for each whether a model is to learn it.
    notes: what a user should know of all conversations like this one.
  """

  ids: list[int]
  learned: np.ndarray
  notes: list[str]


class TemplateUnfit(ValueError):
  """A chat template from whose text answers cannot be told."""


def messages_of(value: Any) -> list[Message]:
  """Returns the messages of a record: a list of {"role": ..., "content": ...}, or of {"from": ..., "value": ...}.

  The list may be a string of JSON. A content of several texts is joined, one that is null or missing beside tool calls
  is empty, and other keys that are null are left out.

  Raises:
    ValueError: the value is something else, a content is no text, or no message but perhaps the first is the
      assistant's.
  """
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError:
      value = None
  if not isinstance(value, list) or not value:
    raise ValueError("wanted a list of messages")
  messages = [_message(message, number) for number, message in enumerate(value)]
  if not any(message["role"] == ASSISTANT for message in messages[1:]):
    roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
    raise ValueError(f"no message of the {ASSISTANT} answers another; the roles are {roles}")
  return messages


def _message(message: Any, number: int) -> Message:
  if not isinstance(message, Mapping):
    raise ValueError(f"message {number} is no object")
  made = {name: part for name, part in message.items() if part is not None}
  if "role" not in made and isinstance(made.get("from"), str):
    made["role"] = _ROLES.get(made["from"], made["from"])
    made = {"content" if name == "value" else name: part for name, part in made.items() if name != "from"}
  if not isinstance(made.get("role"), str):
    raise ValueError(f"message {number} has no role")
  if "content" not in made and not (made.get("tool_calls") or "content" in message):
    raise ValueError(f"message {number} has no content")
  content = made.get("content", "")
  if isinstance(content, list):
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
  if not isinstance(content, str):
    raise ValueError(f"the content of message {number} is no text")
  return {**made, "content": content}


class _Answer(NamedTuple):
  """An answer in the text of a conversation.

  Attributes:
    begin: where in the text it begins.
    ids: the ids to learn.
  """

  begin: int
  ids: list[int]


def encode_conversation(tokenizer: Tokenizer, talk: Talk | Sequence[Message]) -> Conversation:
  """Encodes a conversation; a model learns the answers of the assistant, each with the token that ends it.

  An answer is what stands in the text between the conversation before it, rendered with the beginning of an answer, and
  the conversation until it. It ends with its first end-of-text token, or else its last special token, or else all of it
  is learned. What comes behind the last answer is left out. Where the template renders earlier answers otherwise than
  the last one, as those do that leave out what was thought, the last one alone is learned. The begin-of-text id is the
  template's own matter.

  Args:
    tokenizer: has the chat template.
    talk: the conversation, or its messages, as `messages_of` returns them.

  Raises:
    ValueError: the template refuses the messages, or an answer has no token.
    TemplateUnfit: the template renders what comes before the last answer otherwise once the answer is there.
  """
  messages, tools = talk if isinstance(talk, Talk) else Talk(list(talk))
  told: dict[str, Any] = {} if tools is None else {"tools": tools}
  answers = [number for number, message in enumerate(messages) if number and message["role"] == ASSISTANT]
  whole = tokenizer.render_chat(messages[: answers[-1] + 1], reply=False, **told)
  found = []
  for number in answers:
    before = tokenizer.render_chat(messages[:number], **told)
    found.append(_answer(tokenizer, before, tokenizer.render_chat(messages[: number + 1], reply=False, **told), whole))
  if found[-1] is None:
    behind = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    raise TemplateUnfit(
      "chat_template.jinja renders what comes before an answer otherwise once the answer is there, so that it cannot "
      f"be told from what it answers. Before: {_end(before)}; in the whole: {_end(whole[: behind + 20])}. Render the "
      "conversations yourself and pack them as text, with --text_key, or take another template."
    )
  learning = [answer for answer in found if answer is not None] if None not in found else [found[-1]]
  ids, begins = _encoded(tokenizer, whole, learning)
  learned = np.zeros(len(ids), bool)
  for begin, answer in zip(begins, learning, strict=True):
    learned[begin : begin + len(answer.ids)] = True
  notes = []
  if None in found:
    notes.append(
      "The chat template renders earlier answers otherwise than the last one: the last one alone is learned."
    )
  if strangers := {answer.ids[-1] for answer in learning} - set(tokenizer.eos_ids):
    named = ", ".join(sorted(repr(tokenizer.decode([i], keep_special=True)) for i in strangers))
    notes.append(
      f"Answers end with {named}, which ends no text of this model: generation does not stop there by itself."
    )
  return Conversation(ids, learned, notes)


def _answer(tokenizer: Tokenizer, before: str, until: str, whole: str) -> _Answer | None:
  """Returns an answer; None if the whole does not begin with what comes before it, or has another answer there.

  Args:
    tokenizer: says which tokens end a text, and which are special.
    before: the conversation before the answer, with the beginning of an answer.
    until: the conversation until the answer, included.
    whole: the whole conversation.
  """
  if not (whole.startswith(before) and until.startswith(before)):
    return None
  ids = tokenizer.encode_rendered(until[len(before) :], continues=True)
  ends = [at for at, token in enumerate(ids) if token in tokenizer.eos_ids]
  special = [at for at, token in enumerate(ids) if tokenizer.is_special(token)]
  ids = ids[: (ends[:1] or special[-1:] or [len(ids)])[0] + 1]
  there = tokenizer.encode_rendered(whole[len(before) : len(until)], continues=True)
  return _Answer(len(before), ids) if ids and there[: len(ids)] == ids else None


def _encoded(tokenizer: Tokenizer, whole: str, answers: Sequence[_Answer]) -> tuple[list[int], list[int]]:
  """Returns (ids of a conversation, where each of the answers begins in them).

  The ids are those of the whole text. Where a token of it would lie across the beginning of an answer, as of an answer
  that begins with spaces, the answers are encoded apart from what comes before them: that is how they are generated.
  """
  ids = tokenizer.encode_rendered(whole)
  begins = []
  for answer in answers:
    before = tokenizer.encode_rendered(whole[: answer.begin])
    begins.append(len(before))
    if ids[: len(before)] != before or ids[len(before) :][: len(answer.ids)] != answer.ids:
      break
  else:
    return ids, begins
  cuts = [0, *(answer.begin for answer in answers), len(whole)]
  parts = [
    tokenizer.encode_rendered(whole[first:last], continues=first > 0) for first, last in itertools.pairwise(cuts)
  ]
  return [i for part in parts for i in part], list(itertools.accumulate(map(len, parts)))[:-1]


def _end(text: str) -> str:
  return repr(text[-60:])
