"""Flags that belong together: the options of a recipe, and the fields of one of several dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict


def find_base(argv: list[str]) -> None:
  """Makes `from configs import base` work in the recipes named by --*config=DIR/configs/FILE.py, wherever DIR is."""
  for argument in argv:
    name, _, path = argument.partition("=")
    if name.endswith("config") and path.endswith(".py") and Path(path).resolve().parent.name == "configs":
      sys.path.append(str(Path(path).resolve().parents[1]))


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


def given(
  choices: Mapping[str, type], choice: flags.FlagHolder, fields: Mapping[str, str], also: Mapping[str, Sequence[str]]
) -> Any:
  """Makes the dataclass that a flag chooses, of those flags that are its fields.

  Args:
    choices: value of the flag `choice` -> dataclass.
    choice: the flag that chooses.
    fields: flag -> field, where their names differ.
    also: value of `choice` -> flags that apply to it besides.

  Raises:
    ValueError: a flag is given that applies to other choices only.
  """

  def flags_of(name: str) -> dict[str, str]:
    flag_of = {field: flag for flag, field in fields.items()}
    every = {flag_of.get(field.name, field.name): field.name for field in dataclasses.fields(choices[name])}
    return {flag: field for flag, field in every.items() if flag in flags.FLAGS}

  own, chosen = flags_of(choice.value), choice.value
  for flag in sorted({flag for name in choices for flag in [*flags_of(name), *also.get(name, ())]}):
    applies = [name for name in choices if flag in flags_of(name) or flag in also.get(name, ())]
    if flags.FLAGS[flag].present and chosen not in applies:
      raise ValueError(
        f"--{flag} does not apply to --{choice.name}={chosen}, but to --{choice.name}={' and '.join(applies)}."
      )
  return choices[chosen](**{field: flags.FLAGS[flag].value for flag, field in own.items()})
