"""Standard JSON, without the `NaN` and `Infinity` that Python's own writer emits and other parsers reject."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **how: Any) -> str:
  """Returns `value` as JSON text: NaN and infinities become null, numpy and jax scalars plain numbers.

  Args:
    value: nested mappings, lists, tuples and scalars.
    **how: further arguments of `json.dumps`.

  Raises:
    TypeError: a value has a type that JSON does not have.
    ValueError: a value is an array of several elements.
  """
  return json.dumps(_plain(value), allow_nan=False, **how)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
