"""Description of an export, common to all formats: a config, and how its tensors are made of our parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert_weights import names
from convert_weights.errors import ConversionError
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.softmax import SoftmaxConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig


def _as_it_is(array: np.ndarray) -> np.ndarray:
  return array


def _transposed(array: np.ndarray) -> np.ndarray:
  return array.swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of a tensor to write, made of one parameter of ours.

  Attributes:
    path: path of the parameter in our parameter tree.
    change: function from the parameter's array to the rows.
  """

  path: tuple[str, ...]
  change: Callable[[np.ndarray], np.ndarray] = _as_it_is


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to write: the rows of its parts, concatenated along the first axis."""

  name: str
  shape: tuple[int, ...]
  parts: Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Export:
  """Description of a directory to write, without weights and tokenizer.

  Attributes:
    config: contents of config.json, without the type of the weights.
    tensors: all tensors of the model, in the order in which they are written.
    files: file name -> contents of the format's other files: generation settings and code.
  """

  config: Mapping[str, Any]
  tensors: Sequence[Tensor]
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def part_of(parameter: names.Parameter) -> Part:
  """Returns the part that holds a parameter in the layout of other programs, where linear weights are [out, in]."""
  return Part(parameter.path, _transposed if parameter.transposed else _as_it_is)


def transformers_tensors(config: ModelConfig) -> list[Tensor]:
  """Returns the model's tensors under the names and in the layout of transformers."""
  return [Tensor(p.hf, p.source_shape, [part_of(p)]) for p in names.parameters(config)]


def shared_linear_config(layers: Iterable[MixerConfig], *others: type[MixerConfig]) -> WindowConfig:
  """Returns the mixer options that the linear ones of these layers share, for formats that store one set per model.

  Args:
    layers: the layers.
    *others: mixer configs that the format knows besides those of softmax and of SUPRA.

  Raises:
    ConversionError: two linear layers have different options, or a layer is neither linear nor softmax.
  """
  shared: dict[str, Any] = {}
  for layer in dict.fromkeys(layers):
    if type(layer) not in (SoftmaxConfig, SupraConfig, WindowConfig, *others):
      raise ConversionError(f"Layers with the mixer {layer.mixer!r}: the format has none such.")
    for name, value in dataclasses.asdict(layer).items():
      if shared.setdefault(name, value) != value:
        raise ConversionError(
          f"Layers with {name}={shared[name]!r} and with {name}={value!r}: the format stores it once for all layers."
        )
  return WindowConfig(**{"sinks": 0, **shared})


def essential(config: ModelConfig) -> ModelConfig:
  """Returns the config of the same model with default values in the fields that none of the layers uses."""
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
  """Returns a line `field=value` for each field in which the configs differ, with the value in `wanted`."""

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
  """Returns token ids as config.json stores them: a list of several ids, a single id, or None for no id."""
  return list(ids) if len(ids) > 1 else next(iter(ids), None)
