"""What `--help` says of the options of recipes: name, value and meaning of each."""

from __future__ import annotations

import functools
import textwrap
from typing import Any

from absl import flags

from supra_jax.core.schema import documented

_CLASSES: dict[str, type] = {}
_fill = functools.partial(textwrap.fill, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def given(argv: list[str]) -> dict[str, str]:
  """Returns {name: value} of the arguments --NAME=VALUE."""
  return dict(argument.lstrip("-").split("=", 1) for argument in argv if "=" in argument)


def describe(flag: flags.FlagHolder, cls: type) -> None:
  """Has `--help` list the options of the recipes that a flag names, which are fields of the dataclass `cls`."""
  _CLASSES[flag.name] = cls


def described(argv: list[str]) -> str:
  """Returns the options of all flags that are described; with the values of the recipes that `argv` names."""
  recipes = given(argv)
  parts = []
  for name, cls in _CLASSES.items():
    if name not in flags.FLAGS:
      continue  # of another program in this process
    parser: Any = flags.FLAGS[name].parser
    recipe = parser.parse(recipes[name]).to_dict() if name in recipes else {}
    parts.append(f"\nOptions of --{name}, with the values of {recipes.get(name, 'their defaults')}:\n")
    for option, (default, meaning) in documented(cls).items():
      value: Any = recipe
      for key in option.split("."):
        value = value.get(key, default) if isinstance(value, dict) else value
      parts.append(f"  --{name}.{option}={'' if value is None else value}\n{_fill(meaning)}")
  return "\n".join(parts)
