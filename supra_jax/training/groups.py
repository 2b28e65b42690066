"""Labels each parameter with its group and its learning-rate multiplier; splits trees by group.

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
    group: name of the parameter's group; FROZEN if the parameter never trains.
    new: whether the regex of new weights is found in the parameter's path.
    rate: multiplier of the learning rate for this parameter.
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
    new: (regex, learning-rate multiplier). The multiplier applies to parameters in whose path the regex is found; all
      others have the multiplier 1.

  Returns:
    A tree like `params` with a `Label` for each parameter.

  Raises:
    ValueError: a group has no parameter, or the learning-rate multiplier differs from 1 and applies to no parameter.
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
  """Splits a tree that has one leaf per parameter into one tree per group.

  Args:
    tree: one leaf per parameter, such as the parameters, gradients or labels themselves.
    labels: what `label_parameters` returned for the parameters.
    names: names of the groups wanted.

  Returns:
    {name: tree} for each of `names`, then for FROZEN; each tree has None in place of the leaves of other groups.
  """
  return {
    name: jax.tree.map(lambda leaf, label, name=name: leaf if label.group == name else None, tree, labels)
    for name in [*names, FROZEN]
  }


def merge(parts: dict[str, Any]) -> Any:
  """Joins the trees per group that `split` returned into one tree."""

  def first(*leaves):
    return next(leaf for leaf in leaves if leaf is not None)

  return jax.tree.map(first, *parts.values(), is_leaf=lambda x: x is None)
