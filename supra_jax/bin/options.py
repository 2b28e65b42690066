"""What to say of an option that the recipe does not have: ml_collections says its bare name."""

from __future__ import annotations

import difflib
from typing import Any

from absl import flags
from ml_collections import ConfigDict


def unknown_option(argv: list[str]) -> str | None:
  """A sentence about the first --config.KEY=VALUE whose key the recipe lacks; None where there is none."""
  given = dict(argument.lstrip("-").split("=", 1) for argument in argv if "=" in argument)
  for option in given:
    name, _, path = option.partition(".")
    if not path or name not in given or name not in flags.FLAGS:
      continue
    try:
      node: Any = flags.FLAGS[name].parser.parse(given[name])
    except Exception:  # a recipe that does not run is another error, which is said already
      return None
    for key in path.split("."):
      if not isinstance(node, ConfigDict):
        break
      if key not in node:
        unlike = {other: -difflib.SequenceMatcher(None, key, other).ratio() for other in node}
        near = sorted(unlike, key=unlike.__getitem__)
        return f"--{option}: {given[name]} has no option {path}. Nearest to {key}: {', '.join(near[:10])}."
      node = node[key]
  return None
