"""The one error of this package, and how its messages list names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_LISTED = 20


class ConversionError(ValueError):
  """A source that cannot be converted exactly; the message names everything that stands in the way."""


def listing(title: str, items: Iterable[str]) -> list[str]:
  """Lines `title:` and up to MAX_LISTED items below it; none when there is nothing to list."""
  items = list(items)
  if not items:
    return []
  lines = [f"{title} ({len(items)}):", *(f"  {item}" for item in items[:MAX_LISTED])]
  if len(items) > MAX_LISTED:
    lines.append(f"  ... and {len(items) - MAX_LISTED} more")
  return lines


def refuse_pointer(path: Path, contents: bytes) -> None:
  """Raises ConversionError where a file is not there, but the note that Git LFS leaves in its place."""
  if contents.startswith(b"version https://git-lfs.github.com/spec/"):
    raise ConversionError(f"{path}: is a pointer of Git LFS: bring the file itself with `git lfs pull`.")


def read_json_object(path: Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ConversionError: the file is missing, unreadable, no JSON, or no object.
  """
  try:
    contents = path.read_bytes()
    refuse_pointer(path, contents)
    value = json.loads(contents)
  except OSError as error:
    raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from error
  except ConversionError:
    raise
  except (ValueError, RecursionError) as error:
    raise ConversionError(f"{path}: not valid JSON: {error}.") from error
  if not isinstance(value, dict):
    raise ConversionError(f"{path}: wanted a JSON object, got {type(value).__name__}.")
  return value
