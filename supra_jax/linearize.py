"""Softmax parameters -> SUPRA parameters: everything is kept, phi is new."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.checkpoint import load_model, save_model
from supra_jax.config import ModelConfig, SupraConfig
from supra_jax.transformer import Transformer


def linearize(
  params: Mapping[str, Any],
  config: ModelConfig,
  *,
  supra: SupraConfig | None = None,
  layers: Sequence[int] | None = None,
  seed: int = 0,
) -> tuple[dict[str, Any], ModelConfig]:
  """Turns softmax layers into SUPRA layers (paper, section 3).

  What both mixers have (projections and their norms, MLP, embeddings) is kept as it is, bit for bit; what only `supra`
  has (phi, and the gains of its own qk-norm) is drawn as the reference draws it: weight and bias from
  U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

  Args:
    params: of the softmax model, one subtree a layer.
    config: of the softmax model.
    supra: phi, decay and qk-norm; None means the paper's.
    layers: which layers, negative ones counted from the end; None means all.
    seed: of the new weights; a layer's draw depends on the seed and on its place alone.

  Returns:
    (params, config) of the new model. New parameters have the dtype of the layer's q_proj.

  Raises:
    ValueError: a layer is named that there is not, or that is no softmax layer.
  """
  chosen = _chosen_layers(config, layers)
  mixers = tuple("supra" if i in chosen else mixer for i, mixer in enumerate(config.mixers))
  new_config = config.replace(mixers=mixers, supra=config.supra if supra is None else supra)
  return {name: tree for name, tree in params.items()} | _new_layers(params, new_config, chosen, seed), new_config


def linearize_checkpoint(
  checkpoint: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  supra: SupraConfig | None = None,
  layers: Sequence[int] | None = None,
  seed: int = 0,
) -> ModelConfig:
  """`linearize` from model directory to model directory; returns the new config."""
  start = load_model(checkpoint)
  params, config = linearize(start.params, start.config, supra=supra, layers=layers, seed=seed)
  made = {"supra": dataclasses.asdict(config.supra), "layers": None if layers is None else list(layers), "seed": seed}
  save_model(
    output,
    config=config,
    params=params,
    tokenizer_files=start.tokenizer_files,
    source={"linearized_from": start.source, **made},
  )
  return config


def _chosen_layers(config: ModelConfig, layers: Sequence[int] | None) -> list[int]:
  count = config.num_layers
  wanted = [i for i, mixer in enumerate(config.mixers) if mixer == "softmax"] if layers is None else list(layers)
  if not wanted:
    raise ValueError(f"No layer to linearise: mixers are {config.mixers}.")
  for i in wanted:
    if not -count <= i < count:
      raise ValueError(f"Layer {i}: the model has layers 0 to {count - 1}.")
    if config.mixers[i] != "softmax":
      raise ValueError(f"Layer {i} is a {config.mixers[i]!r} layer; only softmax layers can be linearised.")
  return sorted({i % count for i in wanted})


def _new_layers(params: Mapping[str, Any], config: ModelConfig, chosen: Sequence[int], seed: int) -> dict[str, Any]:
  """The chosen layers, with `new` parameters added to the teacher's.

  The shapes of what is new come from the model's own initialiser, run for one layer with everything else left out.
  """
  one_layer = Transformer(config.replace(mixers=("supra",)))
  tokens = jnp.zeros((1, 1), jnp.int32)
  kept = params[f"layers_{chosen[0]}"]["self_attn"].keys()

  @jax.jit
  def draw(key):
    attention = one_layer.init(key, tokens)["params"]["layers_0"]["self_attn"]
    return {name: tree for name, tree in attention.items() if name not in kept}

  new_layers = {}
  for i in chosen:
    layer = params[f"layers_{i}"]
    dtype = layer["self_attn"]["q_proj"]["kernel"].dtype
    new = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), draw(jax.random.fold_in(jax.random.key(seed), i)))
    new_layers[f"layers_{i}"] = {**layer, "self_attn": {**layer["self_attn"], **new}}
  return new_layers
