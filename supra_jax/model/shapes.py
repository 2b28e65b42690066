"""Finds the shapes of a model's parameters without a device, and checks stored parameters against these shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from supra_jax.core.sharding import least_tokens
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import parameter_name
from supra_jax.model.stacking import stacks
from supra_jax.model.transformer import Transformer

_NAMED = 3  # largest number of parameters that an error names


def parameter_shapes(model: Transformer) -> Any:
  """Returns a nested dict of the shape and dtype (float32) of every parameter, each a `jax.ShapeDtypeStruct`.

  The dict has one subtree per layer, or per stack of layers if `model` is stacked. Nothing runs on a device: the
  current mesh may consist of devices that this process does not have.
  """
  return jax.eval_shape(lambda: model.init(jax.random.key(0), least_tokens(), method="logits")["params"])


def check_fit(config: ModelConfig, params: Mapping[str, Any]) -> None:
  """Checks that names and shapes of parameters are those of a model with this config.

  Args:
    config: config of the model.
    params: nested dict of arrays or shapes, with one subtree per layer.

  Raises:
    ValueError: parameters are missing, left over, or have other shapes; the message names the first few.
  """
  # A stack is traced once, however many layers it has.
  wanted = parameter_shapes(Transformer(config, stacked=True))
  for first, length in stacks(config.layers):
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), wanted.pop(f"run_{first}"))
    wanted |= {f"layers_{first + i}": layer for i in range(length)}
  want, have = _by_name(wanted), _by_name(params)
  wrong = [f"{path} is missing" for path in want if path not in have]
  wrong += [f"{path} is of no use to it" for path in have if path not in want]
  both = [path for path in want if path in have and want[path] != have[path]]
  wrong += [f"{path} has shape {have[path]}, wanted {want[path]}" for path in both]
  if wrong:
    more = f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    what = f"{'; '.join(wrong[:_NAMED])}{more}"
    raise ValueError(f"The parameters are not those of the model that the config describes: {what}.")


def _by_name(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {parameter_name(path): tuple(leaf.shape) for path, leaf in leaves}
