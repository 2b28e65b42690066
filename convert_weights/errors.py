"""ConversionError, the one exception of this package, and helpers that raise it or format its messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_LISTED = 20


class ConversionError(ValueError):
  """A source that cannot be converted exactly; the message says why."""


def listing(title: str, items: Iterable[str]) -> list[str]:
  """Returns lines of a message: `title (count):` and up to MAX_LISTED items; no lines if there are no items."""
  items = list(items)
  if not items:
    return []
  lines = [f"{title} ({len(items)}):", *(f"  {item}" for item in items[:MAX_LISTED])]
  if len(items) > MAX_LISTED:
    lines.append(f"  ... and {len(items) - MAX_LISTED} more")
  return lines


def refuse_pointer(path: Path, contents: bytes) -> None:
  """Raises ConversionError if a file is only the pointer that Git LFS leaves in place of a file not yet downloaded.

  Args:
    path: path of the file, for the message.
    contents: bytes of the file.
  """
  if contents.startswith(b"version https://git-lfs.github.com/spec/"):
    raise ConversionError(f"{path}: is a pointer of Git LFS: download the file itself with `git lfs pull`.")


def read_json_object(path: Path) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Raises:
    ConversionError: the file is missing, unreadable or a pointer of Git LFS, or does not hold a JSON object.
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
