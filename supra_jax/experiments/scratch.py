"""Draws a model from scratch, as OpenLM does, for a tokenizer; training it is uptraining."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.core.schema import from_mapping
from supra_jax.core.sharding import least_tokens
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.base import Projections
from supra_jax.model.placement import parameter_name
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import MixerConfig, mixer_class, new_parameters
from supra_jax.model.transformer import Transformer

ROWS = 64  # the vocabulary has a multiple of so many rows, which devices divide
# A projection's kernel [fan_in, fan_out], or an embedding; the layers' last projections are divided by their depth.
_DRAWN = re.compile(r"(?P<layer>layers_(?P<number>\d+)/)?.*(?P<kind>kernel|embedding)")
_LAST = re.compile(r".*/(o_proj|down_proj)/kernel")


def config_of(
  preset: str, mixer: str | MixerConfig, tokenizer: Tokenizer, changes: Mapping[str, Any] | None = None
) -> ModelConfig:
  """Returns the config of a model from scratch: vocabulary and special ids are the tokenizer's.

  Args:
    preset: name from `PRESETS`, which has the shape.
    mixer: mixer of all layers.
    tokenizer: tokenizer of the model.
    changes: fields of the ModelConfig that differ, and `num_layers`. Without `head_dim` it is hidden_size / num_heads
      if one of these is given.

  Raises:
    ValueError: there is no such preset, mixer or field, a value has another type or is out of range, the widths do not
      divide, or the tokenizer has an id that the vocabulary lacks.
  """
  if preset not in PRESETS:
    raise ValueError(f"preset={preset!r}: wanted one of {', '.join(PRESETS)}.")
  shape, changes = PRESETS[preset](mixer), dict(changes or {})
  fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"layers", "rope"} | {"num_layers"}
  if unknown := sorted(changes.keys() - fields):
    raise ValueError(f"{', '.join(unknown)}: no field of a model; wanted some of {', '.join(sorted(fields))}.")
  depth = changes.pop("num_layers", shape.num_layers)
  heads, width = (changes.get(name, getattr(shape, name)) for name in ("num_heads", "hidden_size"))
  for name, value in (("num_layers", depth), ("num_heads", heads), ("hidden_size", width)):
    if type(value) is not int or value < 1:
      raise ValueError(f"{name}={value!r}: wanted a positive whole number.")
  has_heads = issubclass(mixer_class(shape.layers[0].mixer), Projections)
  if has_heads and {"hidden_size", "num_heads"} & changes.keys() and "head_dim" not in changes:
    if width % heads:
      raise ValueError(f"hidden_size={width} is not divisible by num_heads={heads}: give head_dim.")
    changes["head_dim"] = width // heads
  if "num_heads" in changes and "num_kv_heads" not in changes:
    changes["num_kv_heads"] = changes["num_heads"]
  said = {
    "vocab_size": -(-tokenizer.vocab_size // ROWS) * ROWS,
    "bos_token_id": tokenizer.bos_id,
    "eos_token_ids": tokenizer.eos_ids,
  }
  values = {field.name: getattr(shape, field.name) for field in dataclasses.fields(ModelConfig)}
  made = from_mapping(ModelConfig, values | {"layers": shape.layers[:1] * depth} | said | changes, "shape")
  if made.vocab_size < tokenizer.vocab_size:
    raise ValueError(f"vocab_size={made.vocab_size}: the tokenizer has ids up to {tokenizer.vocab_size - 1}.")
  for name, ids in (("bos_token_id", [made.bos_token_id or 0]), ("eos_token_ids", made.eos_token_ids)):
    if not all(0 <= i < made.vocab_size for i in ids):
      raise ValueError(f"{name}={getattr(made, name)}: wanted ids below vocab_size={made.vocab_size}.")
  return typing.cast(ModelConfig, made)


def draw(config: ModelConfig, seed: int) -> Any:
  """Draws the parameters of a model, float32, one subtree per layer.

  Embeddings and the kernels of projections are normal, cut at three standard deviations, of variance 1 / fan_in;
  those of a layer's last projections are divided by sqrt(2 (l + 1)) in layer l, counted from 0 (open_lm/model.py of
  mlfoundations/open_lm; Zhang et al. 2019, arXiv 1908.11365). Gains are 1 and biases 0. What mixers add begins as in
  `linearize --method=random`.

  Args:
    config: config of the model.
    seed: seeds the draws.
  """
  new = re.compile(new_parameters(config.mixers) or "(?!)")
  key = jax.random.key(seed)

  def drawn(path: Any, leaf: jax.Array) -> jax.Array:
    name = parameter_name(path)
    found = _DRAWN.fullmatch(name)
    if found is None or new.search(name):
      return leaf
    fan_in = config.hidden_size if found["kind"] == "embedding" else leaf.shape[-2]
    spread = fan_in**-0.5
    if _LAST.fullmatch(name):
      spread /= math.sqrt(2 * (int(found["number"]) + 1))
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    # jax's truncated normal has, before it is scaled, the spread of the normal that is cut, as torch's.
    return spread * jax.random.truncated_normal(own, -3.0, 3.0, leaf.shape, jnp.float32)

  def everything() -> Any:
    params = Transformer(config).init(key, least_tokens(), method="logits")["params"]
    return jax.tree_util.tree_map_with_path(drawn, params)

  return jax.jit(everything)()
