"""Text in a terminal as it is generated, and a conversation, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from supra_jax.inference.lm import LM


def shown(pieces: Iterable[str]) -> str:
  """Prints pieces of a text as they come; returns the text. Ctrl-C ends it early."""
  whole = ""
  try:
    for piece in pieces:
      print(piece, end="", flush=True)
      whole += piece
  except KeyboardInterrupt:
    print(" [stopped]", end="")
  print(flush=True)
  return whole


def converse(lm: LM, messages: Iterable[str], **how: Any) -> None:
  """Answers messages one by one; `how` has arguments of `LM.stream_chat`."""
  talk: list[dict[str, str]] = []

  def reply() -> Iterator[str]:  # so that Ctrl-C stops the reading of the message too
    yield from lm.stream_chat(talk, **how)

  for message in messages:
    talk.append({"role": "user", "content": message})
    talk.append({"role": "assistant", "content": shown(reply())})


def lines() -> Iterator[str]:
  """Yields what is typed, line by line as it comes, without empty lines, until Ctrl-D or Ctrl-C."""
  at_terminal = sys.stdin.isatty()
  try:
    while line := input("> ") + "\n" if at_terminal else sys.stdin.readline():
      if line.strip():
        yield line.rstrip()
  except (EOFError, KeyboardInterrupt):
    print()
