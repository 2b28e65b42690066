"""The reference's own outputs, and those of transformers, stored under golden/."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supra_jax
from convert_weights import hf_to_orbax
from supra_jax.core.sharding import make_mesh
from supra_jax.model.mixers import supra
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import language_model_loss
from supra_jax.training.optimizer import OptimizerConfig, make_schedule
from supra_jax.training.step import TrainStep
from tests.support import openlm

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [pytest.param("mha_decay", marks=pytest.mark.compat), "gqa_8_2", "no_decay"]
RELEASED = "released_form_bin"
HF = Path(__file__).parent / "golden" / "hf"


@functools.cache
def _load(name):
  """(model, params, golden)"""
  config, params = openlm.load(name)
  return Transformer(config), params, openlm.load_golden(name)


@pytest.fixture(scope="module", params=[*CASES, RELEASED])
def any_case(request):
  if request.param == RELEASED:
    pytest.importorskip("torch")
  return _load(request.param)


@pytest.fixture(scope="module", params=CASES)
def case(request):
  return _load(request.param)


def _close(got, want, tol=1e-4):
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=tol)


def _states_close(state, golden, model):
  # Theirs are decayed once more after the last token, and hold k / sqrt(K).
  slopes = supra.head_slopes(model.config.layers[0], model.config.num_heads)
  ours = np.stack([layer.s for layer in state.layers])
  scale = np.exp(-slopes)[:, None, None] * model.config.head_dim**-0.5
  _close(scale * ours, golden["states"], 1e-4 * np.abs(golden["states"]).max())


def test_logits_and_states_parallel(any_case):
  model, params, golden = any_case
  run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, method="logits"))
  logits, state = run(golden["input_ids"])
  _close(logits, golden["logits_parallel"])
  _states_close(state, golden, model)


def test_logits_and_states_recurrent(any_case):
  model, params, golden = any_case
  step = jax.jit(lambda token, state: model.apply({"params": params}, token, state, method="logits"))
  tokens, logits = golden["input_ids"], []
  state = model.init_state(tokens.shape[0])
  for t in range(tokens.shape[1]):
    out, state = step(tokens[:, t : t + 1], state)
    logits.append(out)
  _close(np.concatenate(logits, 1), golden["logits_recurrent"])
  _states_close(state, golden, model)


def test_slopes(case):
  model, _, golden = case
  np.testing.assert_array_equal(supra.head_slopes(model.config.layers[0], model.config.num_heads), golden["slopes"])


def test_inside_the_layers(case, monkeypatch):
  model, params, golden = case
  op, norm, seen = supra.linear_attention, supra.group_norm, []

  def spy_op(q, k, v, *args, **kwargs):
    out, state = op(q, k, v, *args, **kwargs)
    seen.append([q, k, v, out])
    return out, state

  def spy_norm(x):
    seen[-1].append(norm(x))
    return seen[-1][-1]

  monkeypatch.setattr(supra, "linear_attention", spy_op)
  monkeypatch.setattr(supra, "group_norm", spy_norm)

  @jax.jit
  def run(tokens):
    _, variables = model.apply(
      {"params": params}, tokens, capture_intermediates=lambda module, _: type(module).__name__ == "Block"
    )
    blocks = variables["intermediates"]
    return seen[0], [blocks[f"layers_{i}"]["__call__"][0][0] for i in range(model.config.num_layers)]

  # The golden arrays hold the first 16 tokens of row 0, heads before time, keys and values once a query head.
  (q, k, v, out, normed), hidden = run(golden["input_ids"])
  repeat = model.config.num_heads // model.config.num_kv_heads
  for name, x_BTHK in (
    ("l0_q", q),
    ("l0_k", np.repeat(k, repeat, 2)),
    ("l0_v", np.repeat(v, repeat, 2)),
    ("l0_attn", out),
  ):
    _close(np.swapaxes(x_BTHK[:1, :16], 1, 2), golden[name])
  _close(normed[:1, :16].reshape(1, 16, -1), golden["l0_gn"])
  _close(np.stack(hidden)[:, :1, :16], golden["hidden_after_layer"])


def _mean_loss(model, tokens, z_loss):
  def loss(params):
    sums = language_model_loss(model, params, {"tokens": tokens}, z_loss=z_loss)
    return sums.loss / sums.weight, sums.nll / sums.weight

  return loss


def test_loss_and_gradients(case):
  model, params, golden = case
  run = jax.jit(jax.value_and_grad(_mean_loss(model, golden["input_ids"], 1e-4), has_aux=True))
  (loss, nll), grads = run(params)
  np.testing.assert_allclose(nll, golden["loss_ce"], rtol=1e-5)
  np.testing.assert_allclose(loss, golden["loss_ce_zloss1e4"], rtol=1e-5)
  grads = openlm.to_reference(grads, model.config)
  assert set(grads) == set(golden["grad_names"])
  norms = np.stack([np.linalg.norm(grads[name]) for name in golden["grad_names"]])
  np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-4)
  want = golden["grad_l0_totrain_embed"]
  _close(grads["layers.0.attention._totrain_embed.weight"], want, 1e-4 * np.abs(want).max())


@pytest.mark.compat
def test_eight_optimizer_steps():
  model, params, golden = _load("mha_decay")
  tokens, golden = golden["input_ids"], openlm.load_golden("mha_decay", "golden_train.npz")
  recipe = OptimizerConfig(
    learning_rate=1e-3,
    end_learning_rate=1e-5,
    warmup_steps=3,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay_what="all",
    clip_norm=1.0,
    z_loss=1e-4,
  )
  schedule, mesh = make_schedule(recipe, 8), make_mesh("", jax.devices()[:1])
  train_step, loss = TrainStep(model, recipe, 8), jax.jit(_mean_loss(model, tokens, recipe.z_loss))
  state = train_step.init(jax.tree.map(jnp.array, params))
  step, losses, norms = train_step.compiled(train_step.shardings(state, mesh)), [], []
  for _ in range(8):
    losses.append(loss(state.params)[0])  # z-loss included
    state, metrics = step(state, {"tokens": jnp.asarray(tokens)[None]})
    norms.append(metrics["grad_norm"])
  params = state.params
  np.testing.assert_allclose([schedule(i) for i in range(8)], golden["lrs"], rtol=1e-5)
  np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
  # A relu so close to 0 that rounding picks its side moves one norm by 1e-4; beta2 = 0.98 instead moves it by 3e-3.
  np.testing.assert_allclose(norms, golden["grad_norms_preclip"], rtol=3e-4)
  params = openlm.to_reference(params, model.config)
  norms_after = [np.linalg.norm(params[name]) for name in golden["param_names"]]
  np.testing.assert_allclose(norms_after, golden["param_norms_after"], rtol=1e-5)
  rows = params["layers.0.attention._totrain_embed.weight"][:8]
  _close(rows, golden["final_l0_totrain_embed_weight_rows0_8"], 2e-5)


@pytest.mark.parametrize("name", sorted(path.name for path in HF.iterdir() if path.is_dir()))
def test_transformers(name, tmp_path):
  """That config_legacy.json gives the same model is in convert_weights/test_huggingface.py."""
  source = tmp_path / "source"
  source.mkdir()
  for file in ("model.safetensors", "generation_config.json", "config.json"):
    shutil.copy(HF / name / file, source)
  hf_to_orbax.convert(source, tmp_path / "model")
  lm = supra_jax.load(tmp_path / "model")
  with np.load(HF / name / "golden.npz") as golden:
    tokens, want = golden["input_ids"], golden["logits"]
  logits, _ = lm(tokens)
  _close(logits, want)
  if name == "mistral_sw16":
    assert lm.config.sliding_window == json.loads((HF / name / "config.json").read_text())["sliding_window"] == 16
    first, state = lm(tokens[:, :20])  # the second piece's windows begin in the first
    second, _ = lm(tokens[:, 20:], state)
    _close(np.concatenate([first, second], 1), want)
