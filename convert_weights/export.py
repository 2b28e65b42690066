"""What every format that we write is reduced to: a config, and tensors made of our parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convert_weights import names
from convert_weights.errors import ConversionError
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig


def _as_it_is(array: np.ndarray) -> np.ndarray:
  return array


def _transposed(array: np.ndarray) -> np.ndarray:
  return array.swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Part:
  """Some rows of a tensor: a parameter of ours, and how it becomes them.

  Attributes:
    path: where the parameter lies in our tree.
    change: our array -> the rows.
  """

  path: tuple[str, ...]
  change: Callable[[np.ndarray], np.ndarray] = _as_it_is


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to write: its parts, one below the other."""

  name: str
  shape: tuple[int, ...]
  parts: Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Export:
  """A directory to write, but for weights and tokenizer.

  Attributes:
    config: contents of config.json, without the type of the weights.
    tensors: all of them.
    files: name -> contents of what else belongs to it.
  """

  config: Mapping[str, Any]
  tensors: Sequence[Tensor]
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def part_of(parameter: names.Parameter) -> Part:
  """The parameter as it lies in others' tensors."""
  return Part(parameter.path, _transposed if parameter.transposed else _as_it_is)


def transformers_tensors(config: ModelConfig) -> list[Tensor]:
  return [Tensor(p.hf, p.source_shape, [part_of(p)]) for p in names.parameters(config)]


def shared_linear_config(config: ModelConfig) -> WindowConfig:
  """What the linear layers of a model have in common, for formats that say it once for all layers.

  Raises:
    ConversionError: they differ.
  """
  shared: dict[str, Any] = {}
  for layer in dict.fromkeys(config.layers):
    for name, value in dataclasses.asdict(layer).items():
      if shared.setdefault(name, value) != value:
        raise ConversionError(
          f"Layers with {name}={shared[name]!r} and with {name}={value!r}: the format says it once for all layers."
        )
  return WindowConfig(**{"sinks": 0, **shared})


def essential(config: ModelConfig) -> ModelConfig:
  """The same model, with default values wherever none of its layers looks."""
  changes: dict[str, Any] = {}
  if "softmax" not in config.mixers:
    changes["sliding_window"] = None
  changes["layers"] = tuple(
    dataclasses.replace(layer, decay_start=None)
    if isinstance(layer, SupraConfig) and layer.decay != "lightning"
    else layer
    for layer in config.layers
  )
  if config.value_width == config.head_dim:
    changes["value_head_dim"] = None
  return config.replace(**changes)


def differences(wanted: ModelConfig, got: ModelConfig) -> list[str]:
  """The fields that the two do not share, with the values of the first."""

  def compare(a: Any, b: Any, prefix: str) -> list[str]:
    lines = []
    for field in dataclasses.fields(a):
      ours, theirs, name = getattr(a, field.name), getattr(b, field.name), prefix + field.name
      if field.name == "layers":
        if wanted.mixers != got.mixers:
          lines.append(f"mixers={wanted.mixers!r}")
        pairs = dict.fromkeys(pair for pair in zip(ours, theirs, strict=True) if pair[0].mixer == pair[1].mixer)
        lines += dict.fromkeys(line for pair in pairs for line in compare(*pair, f"{pair[0].mixer}."))
      elif dataclasses.is_dataclass(ours):
        lines += compare(ours, theirs, f"{name}.")
      elif ours != theirs:
        lines.append(f"{name}={ours!r}")
    return lines

  return compare(wanted, got, "")


def one_or_many(ids: tuple[int, ...]) -> int | list[int] | None:
  """Token ids as configs spell them."""
  return list(ids) if len(ids) > 1 else next(iter(ids), None)
