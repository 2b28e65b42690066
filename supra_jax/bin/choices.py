"""Makes a dataclass from flags: one flag chooses the dataclass, the others are the dataclass's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags


def given(
  choices: Mapping[str, type],
  choice: flags.FlagHolder,
  fields: Mapping[str, str],
  also: Mapping[str, Sequence[str]],
  needs: Mapping[str, str],
  why: str = "",
) -> Any:
  """Makes an instance of the dataclass that the flag `choice` names, from the flags that are the dataclass's fields.

  Args:
    choices: value of `choice` -> dataclass.
    choice: the flag that chooses a dataclass.
    fields: name of a flag -> name of its field, where the two differ.
    also: value of `choice` -> names of flags that apply to this choice without being fields.
    needs: name of a flag -> name of another flag, without which the first one has no effect.
    why: why `choice` has its value, if it was not given, for the error.

  Returns:
    The instance; fields whose flags are not given keep their defaults.

  Raises:
    ValueError: a flag applies to other choices only, or lacks the flag that it needs; or a value is out of range.
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
        f"--{flag} does not apply to --{choice.name}={chosen}{why}, but to --{choice.name}={' or '.join(applies)}."
      )
  for flag, needed in needs.items():
    if flags.FLAGS[flag].present and not flags.FLAGS[needed].present:
      raise ValueError(f"--{flag} does nothing without --{needed}.")
  return choices[chosen](**{field: flags.FLAGS[flag].value for flag, field in own.items() if flags.FLAGS[flag].present})


def whole_numbers(flag: flags.FlagHolder) -> list[int] | None:
  """Returns the items of a list flag as integers, None if it is not set; raises ValueError if it holds others."""
  try:
    return None if flag.value is None else [int(item) for item in flag.value or [""]]
  except ValueError as error:
    raise ValueError(f"--{flag.name}={','.join(flag.value)}: wanted whole numbers, as in 0,1,-1.") from error
