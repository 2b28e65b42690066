"""Parses settings on the command line: a mixer and its fields, and fields of a model."""

from __future__ import annotations

import json
import re
from typing import Any

from supra_jax.core.schema import from_mapping
from supra_jax.model.registry import MixerConfig, mixer_class, mixer_names

HELP = (
  "with fields of its config, as in t2r:decay=none,rope=false or memory:window=64,retained=[32]; one of "
  f"{', '.join(mixer_names())}."
)


def mixer_of(text: str) -> MixerConfig:
  """Returns the config of the mixer that `NAME` or `NAME:FIELD=VALUE,...` describes.

  Raises:
    ValueError: there is no such mixer or field, or a value is of another type or out of range.
  """
  name, colon, rest = text.partition(":")
  if colon and not rest:
    raise ValueError(f"--mixer={text}: wanted NAME=VALUE behind the colon, or no colon.")
  made: MixerConfig = from_mapping(mixer_class(name).Config, settings(rest), f"--mixer={text}")
  return made


def settings(text: str) -> dict[str, Any]:
  """Returns {name: value} of `NAME=VALUE,...`; a value that is no JSON is a string. Commas in brackets part nothing.

  Raises:
    ValueError: a part has no `=`.
  """
  made = {}
  for part in re.split(r",(?![^\[]*\])", text) if text else ():
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(f"{part or text}: wanted NAME=VALUE, as in hidden_size=256.")
    try:
      made[name.strip()] = json.loads(value)
    except ValueError:
      made[name.strip()] = value.strip()
  return made
