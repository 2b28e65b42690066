"""Typed access to a foreign config that collects every complaint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 10_000
MAX_SHOWN = 300  # characters of a value in a message


class ConfigReader:
  """Reads typed values and collects every complaint, so that one run names them all.

  Attributes:
    values: the config.
    refused: the complaints so far.
  """

  def __init__(self, values: Mapping[str, Any], prefix: str = ""):
    self.values = values
    self.refused: list[str] = []
    self._prefix = prefix

  def refuse(self, key: str, wanted: str) -> None:
    value = f"={self.values[key]!r}"[:MAX_SHOWN] if key in self.values else ""
    self.refused.append(f"{self._prefix}{key}{value}: {wanted}")

  def number(self, key: str, kind: type, default: Any) -> Any:
    """A positive number, or the default where the key is absent or null."""
    value = self.values.get(key)
    if value is None:
      return default
    allowed = (int, float) if kind is float else (int,)
    # A float holds no integer of 400 digits, so that one is no number here either.
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value <= sys.float_info.max:
      self.refuse(key, f"wanted a positive {kind.__name__}")
      return None
    return kind(value)

  def required(self, key: str, kind: type = int) -> Any:
    """A positive number; 1 where it was refused, so that reading can go on."""
    if self.values.get(key) is None:
      self.refuse(key, "missing")
    return self.number(key, kind, None) or kind(1)

  def layers(self, key: str) -> int:
    """A number of layers; 1 where it was refused, lest a config of a few bytes asks for gigabytes of names."""
    count = self.required(key)
    if count > MAX_LAYERS:
      self.refuse(key, f"wanted at most {MAX_LAYERS}")
      return 1
    return count

  def token_ids(self, key: str, vocab_size: int, *, many: bool = False) -> tuple[int, ...]:
    """One id, or a list of one or `many`; empty where the key is absent, null or refused."""
    value = self.values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if (len(ids) > 1 and not many) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
      self.refuse(key, f"wanted {'token ids' if many else 'one token id'} below vocab_size={vocab_size}")
      return ()
    return tuple(ids)

  def flag(self, key: str) -> bool:
    value = self.values.get(key)
    if value is not None and not isinstance(value, bool):
      self.refuse(key, "wanted true or false")
    return value is True

  def only(self, key: str, first: Any, *others: Any) -> None:
    value, allowed = self.values.get(key), (first, *others)
    if value is not None and value not in allowed:
      self.refuse(key, f"only {' or '.join(map(repr, allowed))} is supported")

  def unknown_keys(self, known: set[str]) -> None:
    """Refuses the keys that nobody here has read, unless null, false or empty says that they are off."""
    for key in sorted(set(self.values) - known):
      value = self.values[key]
      if value is not None and value is not False and value not in ("", [], {}):
        self.refuse(key, "unknown key, which may change the model")
