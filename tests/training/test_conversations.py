"""A run on conversations: it learns what the assistant says, and its losses are of that alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import supra_jax
from benchmarks.runs import make_config
from supra_jax.data.conversations import encode_conversation
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training import loop as train
from supra_jax.training.setup import row_leaves
from tests.data.test_packed_conversations import talks

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPLATE = (
  "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
  parent = tmp_path_factory.mktemp("models")
  model = load_model(tiny.write_checkpoint(parent / "plain", "supra"))
  files = {**model.tokenizer_files, "chat_template.jinja": TEMPLATE.encode()}
  save_model(parent / "chat", config=model.config, params=model.params, tokenizer_files=files, source={})
  return parent / "chat"


@pytest.fixture(scope="module")
def ran(chat_model, tmp_path_factory):
  """(workdir, config, summary) of a run whose recipe names conversations to pack."""
  workdir = tmp_path_factory.mktemp("run")
  path = workdir / "talks.jsonl"
  path.write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in talks(80)))
  data = {"input": str(path), "messages_key": "talk", "documents": "separate", "heldout_every": 10, "heldout_rows": 0}
  config = make_config(chat_model, path, data=data)
  return workdir, config, train.train(config, workdir)


def test_it_learns_answers(ran):
  _, config, summary = ran
  assert summary.nll_after < summary.nll_before - 0.5
  assert row_leaves(config.data, 320) == ("tokens", "segment_ids", "target_weights")


def test_the_loss_is_that_of_answers(ran):
  workdir, _, summary = ran
  lm = supra_jax.load(workdir / "checkpoint")
  whole = [encode_conversation(lm.tokenizer, talk) for talk in talks(80)[9::10]]
  # In one row, cut as rows of 64 are: a conversation that is cut begins anew.
  ids, learned = np.concatenate([w.ids for w in whole]), np.concatenate([w.learned for w in whole])
  document = np.concatenate([[number] * len(w.ids) for number, w in enumerate(whole)])
  losses = []
  for first in range(0, (len(ids) - 1) // 64 * 64, 64):
    row = slice(first, first + 65)
    logits, _ = lm(ids[row][None, :-1], segment_ids=document[row][None, :-1])
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[0])), ids[row][1:, None], axis=1)[:, 0]
    counts = learned[row][1:] & (document[row][1:] == document[row][:-1])
    losses += nll[counts].tolist()
  assert len(losses) > 100 and np.mean(losses) == pytest.approx(summary.nll_after, abs=2e-5)


def test_the_gradient_is_that_of_answers(ran):
  """Other questions, of the same tokens' number, change what is read; with weights of 0 nothing is learned of them."""
  from supra_jax.objectives.losses import language_model_loss

  lm = supra_jax.load(ran[0] / "checkpoint")
  made = encode_conversation(lm.tokenizer, talks(3)[2])
  batch = {"tokens": np.array([made.ids], np.int32), "target_weights": np.array([made.learned], np.int32)}

  def loss(params, weights):
    return language_model_loss(lm.model, params, {**batch, "target_weights": weights}).loss

  learned = jax.grad(loss)(lm.params, batch["target_weights"])
  everything, others = (
    jax.grad(loss)(lm.params, w) for w in (batch["target_weights"] * 0 + 1, 1 - batch["target_weights"])
  )
  total = jax.tree.map(lambda a, b: a + b, learned, others)
  for one, two in zip(jax.tree.leaves(total), jax.tree.leaves(everything), strict=True):
    np.testing.assert_allclose(one, two, atol=2e-4)
  assert max(float(abs(x).max()) for x in jax.tree.leaves(learned)) > 1e-3


def test_a_model_without_a_template(ran, tmp_path):
  _, config, _ = ran
  plain = tiny.write_checkpoint(tmp_path / "plain", "supra")
  with pytest.raises(ValueError, match="messages_key='talk': the tokenizer comes without a chat template"):
    train.train(dataclasses.replace(config, init_checkpoint=str(plain)), tmp_path / "run")
