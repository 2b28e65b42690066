"""JSON that every reader takes: Python's own writer spells NaN and infinities in words that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **how: Any) -> str:
  """`json.dumps`, where NaN and infinities become null, and scalars of numpy and jax plain numbers.

  Args:
    value: to be written.
    **how: what `json.dumps` takes besides.
  """
  return json.dumps(_plain(value), allow_nan=False, **how)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
