"""Continuations scored through the tree of what texts have in common: as each text alone, with fewer tokens read."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from supra_jax.evaluation import scoring
from supra_jax.evaluation.scoring import Text, scores, tree
from supra_jax.experiments import tiny
from supra_jax.inference.lm import LM
from supra_jax.model.finite import NotFiniteError
from supra_jax.model.registry import layers

pytestmark = pytest.mark.usefixtures("quick_compilation")
MIXERS = {
  "supra": layers(("supra",) * 2),
  "hybrid": layers(("softmax", "supra_window"), window=5, sinks=2),
}


@pytest.fixture(scope="module", params=MIXERS)
def lm(request, random_params, tmp_path_factory):
  directory = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", layers=MIXERS[request.param])
  from supra_jax.storage.model_directory import load_model

  config = load_model(directory).config
  return LM(config, random_params(config))


def _exam(rng: np.random.Generator) -> list[Text]:
  """Examples, questions after them with four answers of one token, and others of many; some texts stand alone."""

  def tokens(count):
    return tuple(rng.integers(1, 90, count).tolist())

  texts = []
  for subject in (tokens(50), tokens(70)):
    for question in (tokens(20), tokens(25), tokens(3)):
      texts += [Text(subject + question + (answer,), 50 + len(question)) for answer in (5, 6, 7, 8)]
  for context in (tokens(30), tokens(41)):
    texts += [Text(context + tokens(count), len(context)) for count in (1, 9, 20)]
  alone = tokens(60)
  return [*texts, Text(tokens(2), 1), Text(alone, 1), Text(alone[:40], 12), Text(alone + tokens(30), 70)]


def _alone(lm: LM, text: Text) -> tuple[float, bool]:
  logits = np.asarray(lm([text.tokens[:-1]])[0][0], np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  rows = range(text.first - 1, len(text.tokens) - 1)
  return sum(logits[i, text.tokens[i + 1]] for i in rows), all(logits[i].argmax() == text.tokens[i + 1] for i in rows)


@pytest.mark.parametrize(("batch_tokens", "piece"), [(64, 16), (512, 2048)])
def test_as_each_text_alone(lm, batch_tokens, piece, monkeypatch):
  monkeypatch.setattr(scoring, "PIECE", piece)
  rng = np.random.default_rng(0)
  texts = _exam(rng)
  order = rng.permutation(len(texts))
  told = {}
  found, work = scores(lm, [texts[i] for i in order], batch_tokens=batch_tokens, each=told.__setitem__)
  want = [_alone(lm, texts[i]) for i in order]
  np.testing.assert_allclose([score for score, _ in found], [score for score, _ in want], atol=1e-4, rtol=0)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
  assert told == dict(enumerate(found))
  assert work.read < 0.5 * work.asked and work.read <= work.padded


def test_what_is_read_once():
  """Four endings of five tokens after a context of forty; four answers of one token to three questions."""

  def read(texts):
    return sum(len(node.tokens) for node in scoring.all_nodes(tree(texts)))

  context = tuple(range(40))
  assert read([Text((*context, *[50 + i] * 5), 40) for i in range(4)]) == 39 + 4 * 5
  examples, questions = tuple(range(100)), [tuple(range(200 + 30 * i, 230 + 30 * i)) for i in range(3)]
  answers = [Text((*examples, *question, answer), 130) for question in questions for answer in range(4)]
  assert read(answers) == 100 + 3 * 30
  assert read(answers * 2) == 100 + 3 * 30
  # What fewer than SHARED tokens have in common is not worth a call of its own.
  assert read([Text((1, 2, 3, 4 + i), 3) for i in range(4)]) == 3


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_tree_has_every_text(data):
  """Small alphabets, so that texts have much in common: each target is scored once, after all tokens before it."""
  tokens = st.lists(st.integers(0, 1), min_size=2, max_size=12).map(tuple)
  texts = data.draw(st.lists(tokens.flatmap(lambda t: st.builds(Text, st.just(t), st.integers(1, len(t) - 1)))))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring, "SHARED", data.draw(st.integers(1, 4)))
    patch.setattr(scoring, "PIECE", data.draw(st.integers(1, 6)))
    nodes = tree(texts)
  found = []

  def walk(node, before):
    assert 0 < len(node.tokens) <= 12
    for at, target, i in node.scored:
      seen = (*before, *node.tokens[: at + 1])
      assert texts[i].tokens[: len(seen) + 1] == (*seen, target)
      assert len(before) + len(node.tokens) <= node.longest
      found.append((i, len(seen)))
    for child in node.children:
      walk(child, (*before, *node.tokens))

  for node in nodes:
    walk(node, ())
  assert sorted(found) == [(i, at) for i, text in enumerate(texts) for at in range(text.first, len(text.tokens))]


def test_what_cannot_be_scored_is_named(lm):
  for text in (Text((1, 2), 0), Text((1, 2), 2), Text((), 0)):
    with pytest.raises(ValueError, match="Text 1 has"):
      scores(lm, [Text((1, 2), 1), text])
  assert scores(lm, [])[0] == []
  broken = jax.tree.map(lambda x: x * np.nan, lm.params)
  with pytest.raises(NotFiniteError, match="Request 0: The logits after token 1"):
    scores(LM(lm.config, broken), [Text((1, 2, 3), 1)])
