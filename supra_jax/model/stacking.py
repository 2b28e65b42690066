"""Stacks the parameters of consecutive layers of a kind into one subtree, over which the model scans (`nn.scan`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import MixerConfig


def stacks(layers: Sequence[MixerConfig]) -> list[tuple[int, int]]:
  """Returns (index of the first layer, number of layers) of each stack.

  A stack is a longest possible sequence of consecutive layers whose mixer configs are `alike`.
  """
  found, first = [], 0
  for _, group in itertools.groupby(layer.alike for layer in layers):
    length = len(list(group))
    found.append((first, length))
    first += length
  return found


def kinds(stack: Sequence[MixerConfig]) -> tuple[tuple[MixerConfig, ...], jax.Array | None]:
  """Returns (the different configs of a stack's layers; the number of each layer's among them, None if all are one)."""
  different = tuple(dict.fromkeys(stack))
  return different, jnp.array([different.index(layer) for layer in stack]) if len(different) > 1 else None


def stack_layers(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Returns parameters with one subtree per stack, `run_FIRST`, from parameters with one subtree per layer, `layers_I`.

  FIRST is the index of the stack's first layer. Arrays of a stack have the layers as a new leading axis.
  """
  stacked = {name: tree for name, tree in params.items() if not name.startswith("layers_")}
  for first, length in stacks(config.layers):
    layers = [params[f"layers_{i}"] for i in range(first, first + length)]
    stacked[f"run_{first}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  return stacked


def unstack_layers(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Returns parameters with one subtree per layer, `layers_I`, from those that `stack_layers` returns."""
  layers = {name: tree for name, tree in params.items() if not name.startswith("run_")}
  for first, length in stacks(config.layers):
    for i in range(length):
      layers[f"layers_{first + i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params[f"run_{first}"])
  return layers
