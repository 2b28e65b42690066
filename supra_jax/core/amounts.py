"""Amounts of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"TB": 10**12, "TiB": 2**40, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "kB": 10**3, "KiB": 2**10}


def parse_bytes(text: str, of: str = "", *, plain: bool = False, example: str = "80GB") -> int:
  """Parses an amount of memory into bytes: `80GB` -> 80,000,000,000.

  Args:
    text: a number followed by one of the units TB, TiB, GB, GiB, MB, MiB, kB and KiB.
    of: name of the flag whose value the text is, for the error.
    plain: whether a number without a unit is one of bytes, `5,966,796`.
    example: an amount of the usual size, for the error.

  Raises:
    ValueError: the text is something else.
  """
  if plain and re.fullmatch(r"[1-9]\d*(,\d{3})*", text.strip()):
    return int(text.replace(",", ""))
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([TGMkK]i?B)", text.strip())
  if not found or found[2] not in _UNITS:
    given = f"--{of}={text}" if of else repr(text)
    also = ", or a whole number of bytes" if plain else ""
    raise ValueError(f"{given}: wanted a number and one of {', '.join(_UNITS)}, as in {example}{also}.")
  return round(float(found[1]) * _UNITS[found[2]])
