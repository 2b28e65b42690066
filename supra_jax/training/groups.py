"""Which parameters train, in which group, and at what multiple of the learning rate: a label for each parameter.

A run labels its parameters once, from their paths. Everything that works on a group (moments, gradients, updates, the
counts of `plan`) reads the labels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from supra_jax.model.placement import parameter_name

FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class Label:
  """What a run does with one parameter.

  Attributes:
    group: the name of its group; FROZEN if it never trains.
    new: whether the regex of new weights finds it.
    rate: multiplier of its learning rate.
  """

  group: str
  new: bool
  rate: float


def label_parameters(params: Any, groups: Sequence[tuple[str, str]], new: tuple[str, float]) -> Any:
  """Labels every parameter.

  Args:
    params: nested dicts of arrays or shapes.
    groups: (name, regex). A parameter belongs to the first group whose regex is found in its path, such as
      "run_0/mlp/up_proj/kernel". Parameters that no regex finds are FROZEN.
    new: (regex, learning-rate multiplier of the parameters whose path it is found in). Others have the multiplier 1.

  Returns:
    A tree like `params` with a `Label` for each parameter.

  Raises:
    ValueError: a group has no parameter, or the multiplier differs from 1 and applies to no parameter.
  """
  pattern, rate = new

  def label(path: Any, _: Any) -> Label:
    name = parameter_name(path)
    group = next((group for group, regex in groups if re.search(regex, name)), FROZEN)
    is_new = re.search(pattern, name) is not None
    return Label(group, is_new, rate if is_new else 1.0)

  labels = jax.tree_util.tree_map_with_path(label, params)
  leaves = jax.tree.leaves(labels)
  used = {leaf.group for leaf in leaves}
  empty = [regex for group, regex in groups if group not in used]
  if rate != 1 and not any(leaf.new for leaf in leaves):
    empty.append(pattern)
  if empty:
    raise ValueError(f"No parameter is left to train by the regex {empty[0]!r}.")
  return labels


def split(tree: Any, labels: Any, names: Sequence[str]) -> dict[str, Any]:
  """Cuts a tree like the parameters into one tree a group.

  Args:
    tree: one leaf for each parameter.
    labels: of `label_parameters`.
    names: the groups wanted.

  Returns:
    For each name, then for FROZEN: the tree with None in place of every leaf that belongs to another group.
  """
  return {
    name: jax.tree.map(lambda leaf, label, name=name: leaf if label.group == name else None, tree, labels)
    for name in [*names, FROZEN]
  }


def merge(parts: dict[str, Any]) -> Any:
  """The inverse of `split`."""

  def first(*leaves):
    return next(leaf for leaf in leaves if leaf is not None)

  return jax.tree.map(first, *parts.values(), is_leaf=lambda x: x is None)
