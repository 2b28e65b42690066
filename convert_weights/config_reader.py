"""Typed access to another program's config that collects every complaint, so that one message can list all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 10_000
MAX_SHOWN = 300  # a message shows at most this many characters of a value


class ConfigReader:
  """Reads typed values from a config and collects every complaint, so that one error can list all complaints.

  Attributes:
    values: key -> value of the config.
    refused: the complaints so far, one line each.
  """

  def __init__(self, values: Mapping[str, Any], prefix: str = ""):
    self.values = values
    self.refused: list[str] = []
    self._prefix = prefix

  def refuse(self, key: str, wanted: str) -> None:
    """Records a complaint about a key: its value, and what was wanted."""
    value = f"={self.values[key]!r}"[:MAX_SHOWN] if key in self.values else ""
    self.refused.append(f"{self._prefix}{key}{value}: {wanted}")

  def number(self, key: str, kind: type, default: Any) -> Any:
    """Returns a positive `kind` (int or float); `default` if the key is absent or null, None if it is refused."""
    value = self.values.get(key)
    if value is None:
      return default
    allowed = (int, float) if kind is float else (int,)
    # JSON integers may be too large for a float, which `kind(value)` could not convert.
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value <= sys.float_info.max:
      self.refuse(key, f"wanted a positive {kind.__name__}")
      return None
    return kind(value)

  def required(self, key: str, kind: type = int) -> Any:
    """Returns a positive number; 1 if the key is missing or its value is refused, so that reading can go on."""
    if self.values.get(key) is None:
      self.refuse(key, "missing")
    return self.number(key, kind, None) or kind(1)

  def layers(self, key: str) -> int:
    """Returns a number of layers, at most MAX_LAYERS; 1 if the key is missing or its value is refused.

    Without the limit, a config of a few bytes could make the converter build gigabytes of parameter names.
    """
    count = self.required(key)
    if count > MAX_LAYERS:
      self.refuse(key, f"wanted at most {MAX_LAYERS}")
      return 1
    return count

  def token_ids(self, key: str, vocab_size: int, *, many: bool = False) -> tuple[int, ...]:
    """Returns token ids below `vocab_size`; an empty tuple if the key is absent or null, or the value is refused.

    The value may be one id or a list of one id; if `many`, a list of any length.
    """
    value = self.values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if (len(ids) > 1 and not many) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
      self.refuse(key, f"wanted {'token ids' if many else 'one token id'} below vocab_size={vocab_size}")
      return ()
    return tuple(ids)

  def flag(self, key: str) -> bool:
    """Returns a boolean; False if the key is absent or null, or the value is refused."""
    value = self.values.get(key)
    if value is not None and not isinstance(value, bool):
      self.refuse(key, "wanted true or false")
    return value is True

  def only(self, key: str, first: Any, *others: Any) -> None:
    """Records a complaint unless the key is absent, or its value is null or one of the given values."""
    value, allowed = self.values.get(key), (first, *others)
    if value is not None and value not in allowed:
      self.refuse(key, f"only {' or '.join(map(repr, allowed))} is supported")

  def unknown_keys(self, known: set[str]) -> None:
    """Records a complaint about each key outside `known`, unless the value is null, false or empty (feature off)."""
    for key in sorted(set(self.values) - known):
      value = self.values[key]
      if value is not None and value is not False and value not in ("", [], {}):
        self.refuse(key, f"unknown key, which may change the model (--ignore_config_keys={key} if it does not)")
