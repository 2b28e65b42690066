"""What uptraining refuses, by name, and what it has written by then."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.runs import make_config
from supra_jax.experiments import tiny
from supra_jax.model.adapters import AdapterConfig
from supra_jax.model.registry import layers
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training import loop as train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"data": {"heldout_every": 100}}, "heldout part"),  # of 24 documents
    ({"trainable": "no_such_layer"}, "no_such_layer"),
    ({"trainable": "(["}, r"trainable='\(\[': wanted a regular expression: unterminated"),
    ({"new_weights": "*"}, r"new_weights='\*': wanted a regular expression: nothing to repeat"),
    ({"num_steps": 0}, "num_steps=0"),
  ],
)
def test_what_cannot_be_is_named(start, text, tmp_path, changes, named):
  with pytest.raises((ValueError, OSError), match=named):
    train.train(make_config(start, text, **changes), tmp_path)


def _of_another_model(start, directory) -> str:
  copy = shutil.copytree(start, directory)
  config = load_model(start).config
  (copy / "config.json").write_text(config.replace(intermediate_size=config.intermediate_size + 1).to_json())
  return str(copy)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    (lambda start, other: {"init_checkpoint": "nowhere"}, "nowhere is not a supra_jax model"),
    (lambda start, other: {"init_checkpoint": _of_another_model(start, other)}, "params: The parameters are not those"),
    (lambda start, other: {"mesh": "fsdp:3"}, "fsdp:3"),
    (lambda start, other: {"data": {"heldout_every": -1}}, r"heldout_every=-1: wanted .*with data.input 2 or more"),
    (lambda start, other: {"data": {"heldout_every": 0}}, r"heldout_every=0: wanted 2 or more with data.input"),
  ],
)
def test_what_cannot_be_is_named_before_anything_is_written(start, text, tmp_path, changes, named):
  with pytest.raises((ValueError, OSError), match=named):
    train.train(make_config(start, text, **changes(start, tmp_path / "other")), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_tokenizer_is_refused(start, text, tmp_path):
  bare = tmp_path / "bare"
  model = load_model(start)
  save_model(bare, config=model.config, params=model.params, tokenizer_files={}, source={})
  with pytest.raises(ValueError, match="has no tokenizer"):
    train.train(make_config(bare, text), tmp_path / "run")


def test_stages_that_cannot_be_are_named(start, text):
  for changes, named in (
    ({"transfer_steps": 3}, "transfer_steps=3: wanted distill_from"),
    ({"distill_hidden": 0.5}, "distill_hidden=0.5: wanted distill_from"),
    ({"distill_from": "x", "transfer_steps": 1, "new_weights_steps": 2}, "wanted one of the two"),
    ({"transfer_steps": -1}, "transfer_steps=-1: wanted a whole number, 0 or more"),
  ):
    with pytest.raises(ValueError, match=named):
      make_config(start, text, **changes)
  with pytest.raises(ValueError, match=r"adapters.rank=-1"):
    AdapterConfig(rank=-1)


def test_a_teacher_of_another_depth_has_no_layers_to_compare(start, text, tmp_path):
  teacher = tiny.write_checkpoint(tmp_path / "teacher", "softmax", layers=layers(("softmax",) * 3))
  config = make_config(start, text, distill_from=str(teacher), transfer_steps=1)
  with pytest.raises(ValueError, match=r"has num_layers=3, the model 2"):
    train.train(config, tmp_path / "run")


def test_a_teacher_of_another_kind_is_refused(start, text, tmp_path):
  teacher = tiny.write_checkpoint(tmp_path / "teacher", "softmax", hidden_size=96)
  config = make_config(start, text, distill_from=str(teacher))
  with pytest.raises(ValueError, match=r"has hidden_size=96, the model 48: wanted the transformer"):
    train.train(config, tmp_path / "run")
  with pytest.raises(
    ValueError, match=r"distill_weight=2.0: wanted a finite number, 0 or more, 1 at most \(a share of the loss"
  ):
    make_config(start, text, distill_weight=2.0)
