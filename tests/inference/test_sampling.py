"""Draws: what each setting keeps, in one program, and no row changes another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.inference import sampling as module
from supra_jax.inference.sampling import TOP, Draws, Sampling, draw

pytestmark = pytest.mark.usefixtures("quick_compilation")
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
_draw = jax.jit(draw)


def _rows(samplings, logits, prompts=None, alternatives=False):
  draws = Draws.of(samplings, prompts or [()] * len(samplings), logits.shape[-1])
  logits = np.broadcast_to(logits, (len(samplings), logits.shape[-1]))
  return _draw(logits, draws, np.bool_(alternatives))


def _frequencies(sampling, count=4000):
  """How often each token is drawn with as many seeds."""
  seeds = [sampling.__class__(**{**sampling.__dict__, "seed": seed}) for seed in range(count)]
  drawn, _ = _rows(seeds, LOGITS)
  return np.bincount(np.asarray(drawn.token), minlength=4) / count


@pytest.mark.parametrize(
  ("sampling", "wanted"),
  [
    (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
    (Sampling(1.0, top_k=2), [0.625, 0.375, 0, 0]),
    (Sampling(1.0, top_p=0.79), [0.625, 0.375, 0, 0]),
    (Sampling(1.0, top_p=0.81), np.array([10, 6, 3, 0]) / 19),
    (Sampling(1.0, min_p=0.2), np.array([10, 6, 3, 0]) / 19),
    (Sampling(1.0, min_p=0.5), [0.625, 0.375, 0, 0]),
    (Sampling(1.0, top_k=3, top_p=0.5), [1, 0, 0, 0]),
    (Sampling(0.5), np.array([100, 36, 9, 1]) / 146),
    (Sampling(1.0, logit_bias={3: 100.0}), [0, 0, 0, 1]),
    (Sampling(0.0), [1, 0, 0, 0]),
    (Sampling(0.0, logit_bias={0: -5.0}), [0, 1, 0, 0]),
  ],
)
def test_what_is_drawn_how_often(sampling, wanted):
  np.testing.assert_allclose(_frequencies(sampling), wanted, atol=0.03)


def test_penalties():
  """Of greedy texts too: token 0 was in the prompt, token 1 is drawn again and again."""
  logits = np.array([2.0, 1.0, -1.0, -1.1], np.float32)

  def drawn(sampling, steps, prompt=()):
    draws, found = Draws.of([sampling], [prompt], 4), []
    for _ in range(steps):
      one, draws = _draw(logits[None], draws, np.False_)
      found.append(int(one.token[0]))
    return found

  assert drawn(Sampling(), 3) == [0, 0, 0]
  assert drawn(Sampling(repetition_penalty=3.0), 2, [0]) == [1, 0]  # 2/3 < 1; then 1/3 < 2/3
  assert drawn(Sampling(repetition_penalty=3.0), 3) == [0, 1, 0]
  assert drawn(Sampling(presence_penalty=1.5), 4) == [0, 1, 0, 0]
  assert drawn(Sampling(frequency_penalty=0.6), 5) == [0, 0, 1, 0, 1]
  assert drawn(Sampling(repetition_penalty=20.0), 4) == [0, 1, 0, 0]  # once a token, however often it was drawn
  # A negative logit is multiplied, not divided.
  assert drawn(Sampling(repetition_penalty=1.2, logit_bias={0: -9.0, 1: -9.0}), 2) == [2, 3]


def _kept(logits, top_k, top_p):
  """The tokens that are kept, by the definition, in float64."""
  order = np.argsort(-logits, kind="stable")[: top_k or None]
  chances = np.exp(logits[order].astype(np.float64))
  before = np.cumsum(chances / chances.sum()) - chances / chances.sum()
  return set(order[: max((before < top_p).sum(), 1)].tolist())


def test_what_reaches_beyond_the_ranked_tokens(monkeypatch):
  """A flat distribution of a large vocabulary, of which only the likeliest are ranked at first."""
  monkeypatch.setattr(module, "_RANKED", 16)
  logits = np.random.default_rng(0).normal(0, 0.3, 200).astype(np.float32)
  settings = [(0, 0.9), (0, 0.05), (10, 1.0), (50, 0.5), (150, 1.0), (16, 0.99), (17, 1.0), (500, 0.3)]
  rows = [Sampling(1.0, k, p, seed=seed) for k, p in settings for seed in range(300)]
  tokens = np.asarray(
    jax.jit(draw)(np.tile(logits, (len(rows), 1)), Draws.of(rows, [()] * len(rows), 200), False)[0].token
  )
  for (k, p), drawn in zip(settings, tokens.reshape(len(settings), -1), strict=True):
    kept = _kept(logits, k, p)
    assert set(drawn.tolist()) <= kept, (k, p)
    assert len(set(drawn.tolist())) > min(len(kept), 100) // 2, (k, p)


def test_a_row_does_not_depend_on_the_others():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (6, 700)).astype(np.float32)
  rows = [
    Sampling(1.0, seed=1),
    Sampling(0.7, 600, 0.99, seed=2),
    Sampling(),
    Sampling(1.3, 5, 0.5, 0.1, 1.3, 0.2, 0.1, {3: 1.0}, seed=3),
    Sampling(1.0, top_p=0.95, seed=4),
    Sampling(0.0, repetition_penalty=1.5),
  ]
  prompts = [[1, 2], [3], [], [5, 6, 7], [8], [int(logits[5].argmax())]]
  blank = [Sampling()] * 5

  def logprobs(samplings, logits, prompts, row):
    drawn, draws = _draw(logits, Draws.of(samplings, prompts, 700), np.False_)
    return [np.asarray(x)[row].tobytes() for x in jax.tree.leaves((drawn, draws))]

  for row, sampling in enumerate(rows):
    alone = logprobs([sampling, *blank], np.roll(logits, -row, 0) * [[1]] + 0, [prompts[row], *[()] * 5], 0)
    assert logprobs(rows, logits, prompts, row) == alone, row


def test_log_probabilities():
  logits = np.random.default_rng(0).normal(0, 2, (2, 40)).astype(np.float32)
  rows = [Sampling(), Sampling(1.0, logit_bias={7: 50.0})]
  drawn, _ = _draw(logits, Draws.of(rows, [(), ()], 40), np.True_)
  wanted = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
  tokens = np.asarray(drawn.token)
  assert tokens.tolist() == [logits[0].argmax(), 7]  # the model's own, before biases
  np.testing.assert_allclose(drawn.logprob, wanted[np.arange(2), tokens], rtol=1e-5)
  order = np.argsort(-logits, axis=-1)[:, :TOP]
  assert np.array_equal(drawn.top_tokens, order)
  np.testing.assert_allclose(drawn.top_logprobs, np.take_along_axis(wanted, order, -1), rtol=1e-5)
  few, _ = _draw(logits[:, :4], Draws.of(rows[:1] * 2, [(), ()], 4), np.True_)
  assert few.top_logprobs.shape == (2, TOP) and np.asarray(few.top_logprobs)[:, 4:].tolist() == [[0.0] * (TOP - 4)] * 2
  bad = logits.copy()
  bad[1, 3] = np.nan
  assert np.asarray(_draw(bad, Draws.of(rows, [(), ()], 40), np.False_)[0].finite).tolist() == [True, False]


@pytest.mark.parametrize(
  ("bad", "said"),
  [
    ({"temperature": -1.0}, "temperature=-1.0: wanted a "),
    ({"top_k": -1}, "top_k=-1: wanted a "),
    ({"top_k": 1.5}, "top_k=1.5: wanted a "),
    ({"top_p": 0.0}, "top_p=0.0: wanted a "),
    ({"min_p": 1.1}, "min_p=1.1: wanted a "),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: wanted a "),
    ({"seed": -1}, "seed=-1: wanted a "),
    ({"logit_bias": {-1: 1.0}}, "logit_bias has -1: 1.0: wanted a token id"),
    ({"logit_bias": {1: np.inf}}, "logit_bias has 1: inf: wanted a token id and a finite number"),
  ],
)
def test_what_cannot_be_is_named(bad, said):
  with pytest.raises(ValueError, match=said):
    Sampling(**bad)


def test_a_bias_outside_the_vocabulary_is_named():
  with pytest.raises(ValueError, match="logit_bias has the token 4: the vocabulary is 0 to 3"):
    Draws.of([Sampling(logit_bias={4: 1.0})], [()], 4)
