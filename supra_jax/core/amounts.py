"""Amounts of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "kB": 10**3, "KiB": 2**10}


def parse_bytes(text: str) -> int:
  """Parses an amount of memory into bytes: `80GB` -> 80,000,000,000.

  Raises:
    ValueError: the text is not a number followed by one of the units GB, GiB, MB, MiB, kB and KiB.
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GMkK]i?B)", text.strip())
  if not found or found[2] not in _UNITS:
    raise ValueError(f"{text!r}: wanted a number and one of {', '.join(_UNITS)}, as in 80GB.")
  return round(float(found[1]) * _UNITS[found[2]])
