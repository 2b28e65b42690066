"""Builds config dataclasses from plain values, and checks values against the limits in the fields' type hints.

The type hint of a field states the limits of its value, and the dataclass calls `check` in `__post_init__`:

  rank: Annotated[int, AtLeast(0)] = 0
  share: Annotated[float, AtLeast(0), AtMost(1), "a share of the loss"] = 1.0
  kind: Literal["adamw", "adafactor"] = "adamw"
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """Limit of a field: the value is `bound` or more."""

  bound: float

  def holds(self, value: Any) -> bool:
    return value >= self.bound

  def __str__(self) -> str:
    return f"{self.bound} or more"


@dataclasses.dataclass(frozen=True)
class AtMost:
  """Limit of a field: the value is `bound` or less."""

  bound: float

  def holds(self, value: Any) -> bool:
    return value <= self.bound

  def __str__(self) -> str:
    return f"{self.bound} at most"


@dataclasses.dataclass(frozen=True)
class Above:
  """Limit of a field: the value is more than `bound`."""

  bound: float

  def holds(self, value: Any) -> bool:
    return value > self.bound

  def __str__(self) -> str:
    return f"more than {self.bound}"


POSITIVE = Above(0)


def check_regex(name: str, value: str) -> None:
  """Raises ValueError, which names the field, if a value is not a regular expression."""
  try:
    re.compile(value)
  except re.error as error:
    raise ValueError(f"{name}={value!r}: wanted a regular expression: {error}.") from error


def check(config: Any, path: str = "") -> None:
  """Checks the fields of a config dataclass that are typed as a Literal or have limits.

  A number with limits has to be finite, and an integer if its type is int. A field typed `X | None` may be None.
  Every item of a field typed `tuple[X, ...]` is checked.

  Args:
    config: an instance of a dataclass.
    path: prefix of field names in errors: "optimizer" where a recipe calls the field `optimizer.kind`. Empty: none.

  Raises:
    ValueError: a field is outside its limits, as in "optimizer.kind='sgd': wanted one of 'adamw', 'adafactor'."
  """
  cls: Any = type(config)
  for name, hint in _hints(cls).items():
    if (unmet := _unmet(hint, getattr(config, name))) is not None:
      raise ValueError(f"{path}{'.' if path else ''}{name}{unmet}.")


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
  return typing.get_type_hints(cls, include_extras=True)


def _unmet(hint: Any, value: Any) -> str | None:
  """Returns the end of an error message, "=VALUE: wanted ...", if a value breaks its type hint's limits; else None."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return None if value is None else _unmet(next(a for a in args if a is not type(None)), value)
  if origin is tuple:
    unmet = next((said for item in value if (said := _unmet(args[0], item)) is not None), None)
    return None if unmet is None else f" holds {unmet.removeprefix('=')}"
  if origin is Literal:
    return None if value in args else f"={value!r}: wanted one of {', '.join(map(repr, args))}"
  if origin is not Annotated:
    return None
  kind, limits = args[0], [limit for limit in args[1:] if not isinstance(limit, str)]
  number = numbers.Integral if kind is int else numbers.Real
  fits = isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)
  if fits and all(limit.holds(value) for limit in limits):
    return None
  # Reads "a positive whole number", or "a finite number, 0 or more".
  positive = "positive " if POSITIVE in limits else ""
  wanted = [
    f"a {positive}{'whole' if kind is int else 'finite'} number",
    *map(str, [limit for limit in limits if limit != POSITIVE]),
  ]
  remarks = [f" ({remark})" for remark in args[1:] if isinstance(remark, str)]
  return f"={value!r}: wanted {', '.join(wanted)}{''.join(remarks)}"


def check_keys(values: Any, known: Set[str], required: Set[str], path: str) -> None:
  """Checks the keys of a mapping.

  Args:
    values: what has to be a mapping.
    known: the keys that `values` may have.
    required: the keys that `values` must have.
    path: name of `values` in error messages.

  Raises:
    ValueError: `values` is not a mapping, has a key that is not in `known`, or lacks a key of `required`.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"{path}: wanted an object, got {values!r}.")
  unknown, missing = sorted(values.keys() - known), sorted(required - values.keys())
  if unknown or missing:
    there = f" There are {', '.join(sorted(known))}." if unknown else ""
    raise ValueError(f"{path}: unknown keys {unknown}, missing keys {missing}.{there}")


def from_mapping(cls: type, values: Any, path: str) -> Any:
  """Builds a config dataclass, and the dataclasses nested in it, from plain values.

  Args:
    cls: a dataclass.
    values: field name -> value, e.g. parsed JSON or a ConfigDict.
    path: name of `values` in error messages.

  Raises:
    ValueError: `values` is not a mapping, a key is unknown or missing, or a value has the wrong type or is one that the
      dataclass rejects; the message names the key.
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
    return value  # `check` in __post_init__ checks the choice and names the field
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


def documented(cls: type) -> dict[str, tuple[Any, str]]:
  """Returns {name: (default, meaning)} of the fields of a dataclass, those of nested dataclasses as `outer.inner`.

  Meanings are those in the section "Attributes" of the class's docstring, and empty where it has none. The default of a
  field without one is None.
  """
  section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
  meanings: dict[str, str] = {}
  for names, meaning in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", section, re.MULTILINE):
    meanings |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
  hints = typing.get_type_hints(cls)
  found: dict[str, tuple[Any, str]] = {}
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      found |= {f"{field.name}.{name}": told for name, told in documented(hints[field.name]).items()}
    else:
      default = None if field.default is dataclasses.MISSING else field.default
      found[field.name] = default, meanings.get(field.name, "")
  return found
