import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from supra_jax.model import presets
from supra_jax.model.registry import layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import CHUNK_TOKENS, count_targets, language_model_loss, next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, TIME, WIDTH, VOCABULARY = 2, 9, 6, 31


def _unembed(params, hidden_ND):
  return hidden_ND @ params["kernel"] + params["bias"]


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  params = {"kernel": rng.standard_normal((WIDTH, VOCABULARY), np.float32), "bias": np.ones(VOCABULARY, np.float32)}
  hidden = rng.standard_normal((BATCH, TIME, WIDTH), np.float32)
  targets = rng.integers(0, VOCABULARY, (BATCH, TIME), np.int32)
  weights = rng.uniform(0.5, 2, (BATCH, TIME)).astype(np.float32) * (rng.random((BATCH, TIME)) < 0.7)
  assert (weights == 0).any()
  return jax.tree.map(jnp.asarray, (params, hidden, targets, weights))


def _plain(params, hidden, targets, weights, z_loss):
  logits = _unembed(params, hidden)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  return (weights * (nll + z_loss * square)).sum(), (weights * nll).sum()


@pytest.mark.parametrize(
  ("chunk", "z_loss", "weighted"),  # of 18 tokens
  [(1, 0.0, True), (4, 0.3, True), (7, 0.3, False), (7, 0.0, True), (18, 0.0, False), (512, 0.3, True)],
)
def test_loss_and_gradients_are_those_of_the_formula(chunk, z_loss, weighted):
  params, hidden, targets, weights = _inputs()
  weights = weights if weighted else None

  def chunked(params, hidden):
    sums = next_token_loss(_unembed, params, hidden, targets, weights, z_loss=z_loss, chunk=chunk)
    return 3 * sums.loss, (sums.loss, sums.nll, sums.weight)  # 3: the cotangent is not always 1

  def plain(params, hidden):
    ones = jnp.ones(targets.shape) if weights is None else weights
    loss, nll = _plain(params, hidden, targets, ones, z_loss)
    return 3 * loss, (loss, nll, ones.sum())

  got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(params, hidden)
  want = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(params, hidden)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
  np.testing.assert_allclose(chunked(params, hidden)[1], got[0][1], rtol=1e-6)  # not differentiated


@pytest.mark.parametrize(("chunk", "weight"), [(3, 0.3), (100, 1.0)])
def test_divergence_from_a_teacher_is_that_of_the_formula(chunk, weight):
  params, hidden, targets, weights = _inputs()
  keys = jax.random.split(jax.random.key(7), 2)
  theirs = jax.tree.map(lambda x: jax.random.normal(keys[0], x.shape), params), jax.random.normal(keys[1], hidden.shape)

  def chunked(params, hidden, theirs):
    how = {"z_loss": 0.1, "chunk": chunk, "teacher": theirs, "teacher_weight": weight}
    return next_token_loss(_unembed, params, hidden, targets, weights, **how).loss

  def plain(params, hidden):
    loss, nll = _plain(params, hidden, targets, weights, 0.1)
    log_p, log_q = (jax.nn.log_softmax(_unembed(*model)) for model in (theirs, (params, hidden)))
    divergence = jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    return loss - weight * nll + weight * divergence

  got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden, theirs)
  want = jax.value_and_grad(plain, argnums=(0, 1))(params, hidden)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
  assert not any(x.any() for x in jax.tree.leaves(jax.grad(chunked, argnums=2)(params, hidden, theirs)))


def test_what_has_no_weight_can_hold_anything():
  params, hidden, targets, weights = _inputs()
  off = weights == 0

  def run(hidden, targets):
    def loss(params, hidden):
      return next_token_loss(_unembed, params, hidden, targets, weights, z_loss=0.1, chunk=4).loss

    return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

  want = run(hidden, targets)
  for rubbish in (jnp.nan, jnp.inf, 1e30):
    got = run(jnp.where(off[..., None], rubbish, hidden), jnp.where(off, 10**6, targets))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
  got = run(hidden, jnp.where(off, -1, targets))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_bfloat16_hidden_states_sum_in_float32():
  params, hidden, targets, weights = _inputs()

  def loss(hidden):
    wide = lambda params, x: _unembed(params, x.astype(jnp.float32))  # noqa: E731
    return next_token_loss(wide, params, hidden, targets, weights, chunk=4).loss

  loss, grad = jax.value_and_grad(loss)(hidden.astype(jnp.bfloat16))
  assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
  want, _ = _plain(params, hidden.astype(jnp.bfloat16).astype(jnp.float32), targets, weights, 0.0)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def _avals(jaxpr):
  for eqn in jaxpr.eqns:
    for var in (*eqn.invars, *eqn.outvars):
      yield var.aval
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(value, "eqns"):
        yield from _avals(value)


def _largest(function, *args):
  return max(np.prod(aval.shape, dtype=int) for aval in _avals(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("tie", [True, False])
def test_all_logits_are_never_held(tie):
  c = presets.tiny().replace(vocab_size=4001, tie_embeddings=tie)
  model, tokens = Transformer(c), np.zeros((4, 257), np.int32)
  params = jax.eval_shape(functools.partial(model.init, method="logits"), jax.random.key(0), tokens)["params"]
  largest = _largest(jax.grad(lambda p: language_model_loss(model, p, {"tokens": tokens}).loss), params)
  assert largest == CHUNK_TOKENS * c.vocab_size < 4 * 256 * c.vocab_size
  plain = _largest(jax.grad(lambda p: model.apply({"params": p}, tokens[:, :-1], method="logits")[0].sum()), params)
  assert plain == 4 * 256 * c.vocab_size  # what the search finds where it is held


@pytest.mark.parametrize("tie", [True, False])
def test_packed_documents_are_separate_ones(tie, random_params):
  c = presets.tiny().replace(layers=layers(("supra", "softmax")), tie_embeddings=tie)
  model, params = Transformer(c), random_params(c)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, c.vocab_size, (2, 13), np.int32)
  segment_ids = np.array([[5] * 4 + [2] * 9, [0] * 6 + [1] + [0] * 6], np.int32)
  documents = [(0, 0, 4), (0, 4, 13), (1, 0, 6), (1, 6, 7), (1, 7, 13)]

  def packed(params):
    sums = language_model_loss(model, params, {"tokens": tokens, "segment_ids": segment_ids}, z_loss=1e-2)
    return sums.loss, sums

  def separate(params):
    # One document a row: what is right of it cannot be seen, and counts for nothing.
    alone = np.zeros((len(documents), 13), np.int32)
    for i, (row, start, end) in enumerate(documents):
      alone[i, : end - start] = tokens[row, start:end]
    lengths = np.array([end - start for _, start, end in documents])
    logits, _ = model.apply({"params": params}, alone[:, :-1], method="logits")
    weights = jnp.float32(np.arange(1, 13) < lengths[:, None])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, alone[:, 1:])
    square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return (weights * (nll + 1e-2 * square)).sum(), ((weights * nll).sum(), weights.sum())

  (loss, sums), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
  (want, (nll, weight)), want_grads = jax.jit(jax.value_and_grad(separate, has_aux=True))(params)
  np.testing.assert_allclose([loss, sums.nll, sums.weight], [want, nll, weight], rtol=1e-5)
  assert sums.weight == 26 - len(documents)
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, np.abs(want).max())),
    grads,
    want_grads,
  )


def test_tokens_of_weight_0_are_read_and_not_learned(random_params):
  c = presets.tiny().replace(layers=layers(("supra", "softmax")))
  model, params = Transformer(c), random_params(c)
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, c.vocab_size, (2, 13), np.int32),
    "segment_ids": np.array([[0] * 13, [0] * 6 + [1] * 7], np.int32),
    "row_weights": np.array([1.0, 0.5], np.float32),
    "target_weights": (rng.random((2, 13)) < 0.5).astype(np.float32) * 3,
  }
  assert batch["target_weights"][1, 6], "a target by its weight, which begins a document"

  def plain(params):
    logits, _ = model.apply(
      {"params": params}, batch["tokens"][:, :-1], segment_ids=batch["segment_ids"][:, :-1], method="logits"
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    loss, weight = 0.0, 0.0
    for row in range(2):
      for at in range(1, 13):
        if batch["segment_ids"][row, at] == batch["segment_ids"][row, at - 1]:
          target = batch["row_weights"][row] * batch["target_weights"][row, at]
          loss, weight = loss + target * nll[row, at - 1], weight + target
    return loss, weight

  (want, weight), want_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
  loss, grads = jax.jit(jax.value_and_grad(lambda p: language_model_loss(model, p, batch).loss))(params)
  np.testing.assert_allclose([loss, count_targets(batch)], [want, weight], rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, want_grads)
