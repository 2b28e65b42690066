"""The door for users: `supra_jax.load(DIR)` and the object it gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supra_jax
from supra_jax.evaluation import likelihood as evaluate
from supra_jax.experiments import tiny
from supra_jax.model.registry import layers
from supra_jax.storage.model_directory import save_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 37))


# A state that never grows, and one that does where there is a cache to grow.
MODELS = {"supra": {}, "hybrid": {"layers": layers(("softmax", "supra_window"), window=5, sinks=2)}}


@pytest.fixture(scope="module", params=MODELS)
def directory(request, tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", **MODELS[request.param])


@pytest.fixture(scope="module")
def lm(directory):
  return supra_jax.load(directory)


@pytest.mark.compat
def test_the_promised_surface(lm):
  logits, state = lm(TOKENS)
  assert logits.shape == (2, 37, tiny.VOCAB) and logits.dtype == jnp.float32
  more, _ = lm(TOKENS[:, :5], state)
  assert more.shape == (2, 5, tiny.VOCAB)
  assert lm.config.num_layers == 2 and lm.tokenizer.decode(lm.tokenizer.encode("a b")) == "a b"
  assert set(lm.params) == {"embed_tokens", "layers_0", "layers_1", "norm", "lm_head"}
  text = lm.generate("The", max_new_tokens=9)
  assert "".join(lm.stream("The", max_new_tokens=9)) == text
  assert lm.generate("The", max_new_tokens=9, temperature=1.0, seed=1) != lm.generate(
    "The", max_new_tokens=9, temperature=1.0, seed=2
  )
  assert isinstance(lm.generate("", max_new_tokens=2), str)


def test_caches_grow_and_shapes_are_padded_without_a_trace(lm):
  plain, _ = jax.jit(lambda params: lm.model.apply({"params": params}, TOKENS, method="logits"))(lm.params)
  np.testing.assert_allclose(lm(TOKENS)[0], plain, atol=1e-4)
  state, pieces = None, []
  for start, end in ((0, 1), (1, 18), (18, 37)):
    logits, state = lm(TOKENS[:, start:end], state)
    pieces.append(logits)
  np.testing.assert_allclose(np.concatenate(pieces, 1), plain, atol=1e-4)
  if "softmax" in lm.config.mixers:
    assert state.capacity == 64 and state.layers[1].k.shape[1] == 7
  else:
    assert state.capacity is None


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_on_either_side(lm, padding):
  lengths = np.array([20, 37])
  rows = np.full((2, 37), -5)
  for b, n in enumerate(lengths):
    rows[b, (slice(37 - n, None) if padding == "left" else slice(n))] = TOKENS[b, :n]
  logits, state = lm(rows, lengths=lengths, padding=padding)
  for b, n in enumerate(lengths):
    alone, alone_state = lm(TOKENS[b : b + 1, :n])
    real = logits[b, 37 - n :] if padding == "left" else logits[b, :n]
    np.testing.assert_allclose(real, alone[0], atol=1e-4)
    next_alone, _ = lm(TOKENS[b : b + 1, :3], alone_state)
    next_batch, _ = lm(TOKENS[:, :3], state)
    np.testing.assert_allclose(next_batch[b], next_alone[0], atol=1e-4)


def test_traced_calls_go_through(lm):
  state = lm.model.init_state(2, 64)
  logits, _ = jax.jit(lambda tokens: lm(tokens, state))(jnp.asarray(TOKENS))
  np.testing.assert_allclose(logits, lm(TOKENS)[0], atol=1e-4)


def test_dtype_is_of_parameters_and_computation(lm, directory):
  low = supra_jax.load(directory, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}
  logits, _ = low(TOKENS)
  assert logits.dtype == jnp.float32
  exact, _ = lm(TOKENS)
  assert 1e-6 < np.abs(logits - exact).mean() < 0.05


def test_bad_input_is_named(lm):
  cases = [
    ({"tokens": TOKENS[0]}, "wanted integers"),
    ({"tokens": TOKENS.astype(np.float32)}, "wanted integers"),
    ({"tokens": TOKENS[:, :0]}, "T >= 1"),
    ({"tokens": TOKENS + tiny.VOCAB}, "not in the vocabulary"),
    ({"tokens": TOKENS - 1000}, "not in the vocabulary"),
    ({"tokens": TOKENS, "lengths": [1, 38]}, "wanted 0 to 37"),
    ({"tokens": TOKENS, "lengths": [1]}, r"wanted \[2\]"),
    ({"tokens": TOKENS, "segment_ids": TOKENS[:, :3]}, r"wanted \[2, 37\]"),
    ({"tokens": TOKENS, "padding": "middle"}, "middle"),
  ]
  for arguments, message in cases:
    with pytest.raises(ValueError, match=message):
      lm(**arguments)


def test_evaluation_agrees_with_the_logits(lm):
  logits, _ = lm(TOKENS)
  logp = np.asarray(jax.nn.log_softmax(logits))
  picked = np.take_along_axis(logp[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]

  nll, count = evaluate.text_nll(lm, TOKENS.reshape(-1).tolist(), sequence_length=37)
  assert count == 72 and nll == pytest.approx(-picked.mean(), abs=1e-5)

  requests = [(TOKENS[0, :30], TOKENS[0, 30:]), (TOKENS[1, :3], TOKENS[1, 3:5])]
  greedy_row = np.concatenate([TOKENS[0, :30], [logp[0, 29].argmax()]])
  requests.append((greedy_row[:30], greedy_row[30:]))
  results = evaluate.loglikelihoods(lm, requests)
  assert results[0][0] == pytest.approx(picked[0, 29:].sum(), abs=1e-4)
  assert results[1][0] == pytest.approx(picked[1, 2:4].sum(), abs=1e-4)
  assert results[2][1] and not results[0][1]
  with pytest.raises(ValueError, match="Text 0 has 1 tokens, scored from 0: wanted some before and after"):
    evaluate.loglikelihoods(lm, [([], [1])])
  with pytest.raises(ValueError, match="sequence_length=1: wanted at least 2"):
    evaluate.text_nll(lm, [1, 2, 3], sequence_length=1)
  with pytest.raises(ValueError, match="max_tokens=512 does not fill one piece: sequence_length=1024"):
    evaluate.evaluate(lm, "any", max_tokens=512)


def test_parameters_for_inference_are_no_parameters_of_a_checkpoint(tmp_path):
  """Where stored ones are wanted they are refused: `supra` has phi in its projections after `load`."""
  mixed = layers(("softmax", "supra"))
  lm = supra_jax.load(tiny.write_checkpoint(tmp_path / "model", "supra", layers=mixed))
  with pytest.raises(ValueError, match="for inference alone"):
    save_model(tmp_path / "again", config=lm.config, params=lm.params, tokenizer_files={}, source={})
  assert not (tmp_path / "again").exists()
  with pytest.raises(ValueError, match=r"layers_1/self_attn/feature_map/kernel is missing"):
    supra_jax.linearize(lm.params, lm.config, supra_jax.Identity())
