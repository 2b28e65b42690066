"""Each parameter has one label: its group, whether it is new, and the multiplier of its learning rate."""

import jax
import numpy as np
import pytest

from supra_jax.training.groups import FROZEN, Label, label_parameters, merge, split

PARAMS = {"run_0": {"mlp": {"kernel": 1.0}, "feature_map": {"kernel": 2.0}}, "norm": {"weight": 3.0}}
GROUPS = (("new", "feature_map"), ("kept", "kernel"))


def test_the_first_regex_that_finds_a_parameter_names_its_group():
  labels = label_parameters(PARAMS, GROUPS, ("feature_map|norm", 0.5))
  assert labels == {
    "run_0": {"mlp": {"kernel": Label("kept", False, 1.0)}, "feature_map": {"kernel": Label("new", True, 0.5)}},
    "norm": {"weight": Label(FROZEN, True, 0.5)},
  }


def test_parts_have_none_for_what_is_of_others():
  labels = label_parameters(PARAMS, GROUPS, (".*", 1.0))
  parts = split(PARAMS, labels, ("new", "kept"))
  assert list(parts) == ["new", "kept", FROZEN]
  assert parts["new"] == {"run_0": {"mlp": {"kernel": None}, "feature_map": {"kernel": 2.0}}, "norm": {"weight": None}}
  assert [jax.tree.leaves(part) for part in parts.values()] == [[2.0], [1.0], [3.0]]
  assert jax.tree.all(jax.tree.map(np.array_equal, merge(parts), PARAMS))


@pytest.mark.parametrize(
  ("groups", "new"), [((("all", ".*"), ("late", "mlp")), (".*", 1.0)), ((("all", ".*"),), ("mlp/x", 0.5))]
)
def test_a_regex_that_finds_nothing_is_named(groups, new):
  with pytest.raises(ValueError, match=r"No parameter is left to train by the regex 'mlp(/x)?'"):
    label_parameters(PARAMS, groups, new)
