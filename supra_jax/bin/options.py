"""Helps on the command line: parses it, makes imports of recipes work, and explains options that a recipe lacks."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from supra_jax.bin.recipe_help import described, given

_HELP = {f"{dashes}{name}" for dashes in ("-", "--") for name in ("?", "help", "helpfull", "helpshort", "helpxml")}


def parse(argv: list[str]) -> list[str]:
  """Parses the flags as absl does, but help ends with status 0, where absl has 1, and lists the options of a recipe."""
  try:
    return app.parse_flags_with_usage(argv)
  except SystemExit:
    if _HELP.intersection(argv):
      print(described(argv))
      sys.exit(0)
    raise


def find_base(argv: list[str]) -> None:
  """Adds DIR to sys.path for each --*config=DIR/configs/FILE.py, so that recipes can do `from configs import base`."""
  for argument in argv:
    name, _, path = argument.partition("=")
    if name.endswith("config") and path.endswith(".py") and Path(path).resolve().parent.name == "configs":
      sys.path.append(str(Path(path).resolve().parents[1]))


def unknown_option(argv: list[str]) -> str | None:
  """Returns an error message for the first --config.KEY=VALUE whose key the recipe lacks.

  Returns None if the recipe has all keys, or cannot be read.
  """
  arguments = given(argv)
  for option in arguments:
    name, _, path = option.partition(".")
    if not path or name not in arguments or name not in flags.FLAGS:
      continue
    try:
      node: Any = flags.FLAGS[name].parser.parse(arguments[name])
    except Exception:  # the recipe itself fails; the caller reports that error
      return None
    for key in path.split("."):
      if not isinstance(node, ConfigDict):
        break
      if key not in node:
        unlike = {other: -difflib.SequenceMatcher(None, key, other).ratio() for other in node}
        near = sorted(unlike, key=unlike.__getitem__)
        return f"--{option}: {arguments[name]} has no option {path}. Nearest to {key}: {', '.join(near[:10])}."
      node = node[key]
  return None
