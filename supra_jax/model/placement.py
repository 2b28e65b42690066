"""Where each parameter lies on a mesh: one rule a kind of parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Parameter path below its layer or run -> {rank: spec}. The first rule that matches the whole path holds. Every model
# has something for each rule to match, so that one that has nothing is a slip.
PARAM_RULES: tuple[tuple[str, Mapping[int, PartitionSpec]], ...] = (
  (
    r"((.*/)?(q_proj|k_proj|v_proj|gate_proj|up_proj|feature_map|feature_map_kv)|lm_head)/kernel",
    {2: PartitionSpec("fsdp", "tensor"), 3: PartitionSpec("tensor", "fsdp", None)},
  ),
  (r".*/(o_proj|linear_o_proj|down_proj)/kernel", {2: PartitionSpec("tensor", "fsdp")}),
  (r"embed_tokens/embedding", {2: PartitionSpec("tensor", "fsdp")}),
  # Gains, biases and adapters: a thousandth of the parameters, and every device wants them whole.
  (r"(.*/)?(weight|bias|lora_[ab])", {1: PartitionSpec(), 2: PartitionSpec()}),
)


_LAYER = re.compile(r"^(layers|run)_\d+/")


def parameter_name(path: Sequence[Any]) -> str:
  """What regexes are held against: "run_0/mlp/up_proj/kernel", of a path of `jax.tree_util` in nested dicts."""
  return "/".join(key.key for key in path)


def param_specs(params: Any, mesh: Mesh, rules: Sequence[tuple[str, Mapping[int, PartitionSpec]]] = PARAM_RULES) -> Any:
  """The PartitionSpec of every parameter.

  Args:
    params: a tree of arrays or shapes, one subtree a layer, or one a run with a leading axis that is never cut.
    mesh: what the specs are for.
    rules: (regex, {rank: spec}), the first that matches holds.

  Raises:
    ValueError: a parameter matches no rule, a rule no parameter, or a dimension cannot be cut evenly.
  """
  used = set()

  def spec_of(path, leaf) -> PartitionSpec:
    name = parameter_name(path)
    stacked = name.startswith("run_")
    short, rank = _LAYER.sub("", name), leaf.ndim - stacked
    for number, (pattern, specs) in enumerate(rules):
      if re.fullmatch(pattern, short) and rank in specs:
        used.add(number)
        spec = PartitionSpec(*([None] * stacked), *specs[rank])
        _check_cuts(name, leaf.shape, spec, mesh)
        return spec
    raise ValueError(f"No sharding rule for the parameter {name} {tuple(leaf.shape)}; add one to PARAM_RULES.")

  specs = jax.tree_util.tree_map_with_path(spec_of, params)
  unused = [pattern for number, (pattern, _) in enumerate(rules) if number not in used]
  if unused:
    raise ValueError(f"Sharding rules that match no parameter: {', '.join(unused)}.")
  return specs


def _check_cuts(name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> None:
  for size, axis in zip(shape, spec, strict=False):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"{name} {tuple(shape)}: {axis}:{mesh.shape[axis]} does not divide {size}. Choose another mesh for this model."
      )


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """`param_specs` as NamedShardings."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, mesh), is_leaf=_is_spec)


def like_params(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Shardings of a tree that holds copies of `params` (moments, say): theirs where path's end and shape agree.

  Everything else, counters and Adafactor's row and column means, is on every device whole.
  """
  shardings = {
    tuple(_key(key) for key in path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(param_shardings(params, mesh)), strict=True
    )
  }
  whole = NamedSharding(mesh, PartitionSpec())

  def find(path, leaf):
    names = tuple(_key(key) for key in path)
    for start in range(len(names)):
      shape, sharding = shardings.get(names[start:], (None, whole))
      if shape == leaf.shape:
        return sharding
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def _key(key: Any) -> Any:
  return getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)
