"""Standard JSON, without the `NaN` and `Infinity` that Python's own writer emits and other parsers reject."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

from supra_jax.core.files import into_place, local


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


def check_output(path: str | os.PathLike[str] | None, beside: Collection[str] = ()) -> None:
  """Checks, before long work, that a JSON file can be written at its end; makes the folders above it.

  Args:
    path: what the user gave; None: no file is written.
    beside: suffixes of files that are written beside it.

  Raises:
    ValueError: the path is empty, a URL or a directory, has a suffix of `beside`, or no file can be written there.
  """
  if path is None:
    return
  file = local(path)
  if not os.fspath(path) or file.is_dir():
    raise ValueError(f"--output={path}: wanted the name of a JSON file to write, not a directory.")
  if file.suffix in beside:
    raise ValueError(f"--output={path}: wanted the name of a JSON file; {file.suffix} is written beside it.")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--output={path}: {file.parent} cannot be made: {error.strerror}.") from error
  if not os.access(file.parent, os.W_OK | os.X_OK):
    raise ValueError(f"--output={path}: this user may not write to {file.parent}.")


def write_json(path: str | os.PathLike[str], value: Any, **how: Any) -> None:
  """Writes `to_json(value, **how)` to a local file, whole or not at all; folders above the file are made.

  Raises:
    OSError: the file cannot be written.
    TypeError, ValueError: as `to_json`, or `path` is a URL.
  """
  text = to_json(value, indent=2, **how) + "\n"
  file = local(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  with into_place(file) as temporary:
    temporary.write_text(text)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
