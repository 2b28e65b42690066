"""Reads config dataclasses from plain values, and checks them."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping, Set
from typing import Any, Literal


def check_choices(config: Any) -> None:
  """Raises ValueError when a field typed as a Literal holds something else."""
  for name, hint in typing.get_type_hints(type(config)).items():
    if typing.get_origin(hint) is Literal:
      value, choices = getattr(config, name), typing.get_args(hint)
      if value not in choices:
        raise ValueError(f"{type(config).__name__}.{name}={value!r}: wanted one of {', '.join(map(repr, choices))}.")


def check_positive(config: Any, *names: str) -> None:
  for name in names:
    if not 0 < getattr(config, name) < math.inf:
      raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)!r}: wanted a positive finite number.")


def check_keys(values: Any, known: Set[str], required: Set[str], path: str) -> None:
  """Raises ValueError when values are no mapping, or have a key that is not known, or lack one."""
  if not isinstance(values, Mapping):
    raise ValueError(f"{path}: wanted an object, got {values!r}.")
  unknown, missing = sorted(values.keys() - known), sorted(required - values.keys())
  if unknown or missing:
    raise ValueError(f"{path}: unknown keys {unknown}, missing keys {missing}.")


def from_mapping(cls: type, values: Any, path: str) -> Any:
  """Builds a config dataclass, nested ones included, from plain values.

  Args:
    cls: a dataclass.
    values: a mapping, e.g. parsed JSON or a ConfigDict.
    path: what the values are called in errors.

  Raises:
    ValueError: a key is unknown or missing, or a value has the wrong type, by name.
  """
  fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
  check_keys(values, {f.name for f in fields}, {f.name for f in fields if f.default is dataclasses.MISSING}, path)
  return cls(**{name: _convert(hints[name], value, f"{path}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return None if value is None else _convert(next(a for a in args if a is not type(None)), value, path)
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise ValueError(f"{path}: wanted a list, got {value!r}.")
    return tuple(_convert(args[0], item, path) for item in value)
  if origin is Literal:
    return value  # __post_init__ checks the choice and names the field
  if dataclasses.is_dataclass(hint):
    if isinstance(value, typing.cast(type, hint)):
      return value
    return from_mapping(typing.cast(type, hint), value, path)
  if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
    if not abs(value) <= sys.float_info.max:
      raise ValueError(f"{path}: wanted a finite number, got {value!r}.")
    return float(value)
  if type(value) is not hint:
    raise ValueError(f"{path}: wanted {hint.__name__}, got {value!r}.")
  return value
