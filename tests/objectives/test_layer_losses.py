import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Random
from supra_jax.model import presets
from supra_jax.model.layers import Norm
from supra_jax.model.registry import layer, layers, mixer_class
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.layer_losses import attention_error, read_streams, streams_error
from supra_jax.objectives.losses import Teacher, attention_transfer_loss, language_model_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOFTMAX = presets.tiny("softmax").replace(layers=layers(("softmax",) * 3))
LINEAR = [1, 2]  # the first stays, so that runs differ


@pytest.fixture(scope="module")
def models(random_params):
  """((model, stacked params) of the student, the same of the teacher, params of both with one subtree a layer)."""
  init = random_params(SOFTMAX)
  linear = linearize(init, SOFTMAX, Random(3), layers=LINEAR)
  made, hybrid = linear.params, linear.config
  return (
    (Transformer(hybrid, stacked=True), stack_layers(made, hybrid)),
    (Transformer(SOFTMAX, stacked=True), stack_layers(init, SOFTMAX)),
    (made, init),
  )


@pytest.fixture(scope="module", params=["joined", "apart"])
def batch(request):
  tokens = np.random.default_rng(0).integers(0, SOFTMAX.vocab_size, (2, 12), np.int32)
  if request.param == "joined":
    return {"tokens": jnp.asarray(tokens)}
  return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(np.repeat([[0, 1], [4, 5]], 6, axis=1))}


def _inputs(batch):
  return batch["tokens"][:, :-1], batch["segment_ids"][:, :-1] if "segment_ids" in batch else None


@functools.partial(jax.jit, static_argnums=(0, 2))
def _streams_error(student, params, teacher, teacher_params, inputs):
  read, wanted = read_streams(student, params, *inputs), read_streams(teacher, teacher_params, *inputs)
  return streams_error(student, read[1], teacher, wanted[1])


@functools.partial(jax.jit, static_argnums=1)
def _by_hand(params, made, batch):
  """Streams that enter each layer and leave the last, and each attention: the blocks' formulas, unstacked."""
  tokens, segment_ids = _inputs(batch)
  model = Transformer(made)
  context, _ = model.place(tokens, segment_ids=segment_ids)
  x, streams, attended = params["embed_tokens"]["embedding"][tokens], [], []
  for i in range(made.num_layers):
    streams.append(x)
    attended.append(_attention(params[f"layers_{i}"], made, made.layers[i], x, context))
    x = x + attended[-1]
    normed = Norm(made.norm, made.norm_eps).apply({"params": params[f"layers_{i}"]["post_attention_layernorm"]}, x)
    mlp = params[f"layers_{i}"]["mlp"]
    gate, up, down = (mlp[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    x = x + (jax.nn.silu(normed @ gate) * (normed @ up)) @ down
  return [*streams, x], attended


def _attention(params, made, layer, x, context):
  normed = Norm(made.norm, made.norm_eps).apply({"params": params["input_layernorm"]}, x)
  return mixer_class(layer.mixer)(made, layer).apply({"params": params["self_attn"]}, normed, None, context)[0]


def _share(x, wanted, scale):
  return np.square(x - wanted).sum(-1) / np.square(scale).sum(-1)


def test_errors_are_those_of_the_formulas(models, batch):
  (student, params), (teacher, teacher_params), (made, init) = models
  inputs = _inputs(batch)
  streams, _ = _by_hand(made, student.config, batch)
  theirs, attended = _by_hand(init, SOFTMAX, batch)
  wanted = np.mean([_share(x, y, y) for x, y in zip(streams[1:], theirs[1:], strict=True)], axis=0)
  got = _streams_error(student, params, teacher, teacher_params, inputs)
  np.testing.assert_allclose(got, wanted, rtol=2e-4)

  @jax.jit
  def attend(made, theirs):
    context, _ = student.place(inputs[0], segment_ids=inputs[1])
    return [_attention(made[f"layers_{i}"], student.config, layer("supra"), theirs[i], context) for i in LINEAR]

  each = [
    _share(ours, attended[i], theirs[i] + attended[i]) for i, ours in zip(LINEAR, attend(made, theirs), strict=True)
  ]
  got = jax.jit(attention_error, static_argnums=(0, 2))(student, params, teacher, teacher_params, *inputs)
  np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=2e-4)
  assert np.mean(wanted) > 0.01 and np.mean(each) > 0.01


def _reached(grads):
  """Paths, below their run, of parameters that a gradient reaches."""
  flat = jax.tree_util.tree_leaves_with_path(grads)
  return {"/".join(key.key for key in path) for path, grad in flat if np.any(grad)}


def test_a_gradient_reaches_what_it_should(models, batch):
  """The transfer: attention and its norm of the linear layers. Streams: all but the last norm. The teacher: nothing."""
  (student, params), (teacher, teacher_params), _ = models

  def transfer(params, teacher_params):
    return attention_transfer_loss(student, params, batch, Teacher(teacher_params, teacher))

  ours, theirs = jax.jit(jax.grad(transfer, argnums=(0, 1)))(params, teacher_params)
  attention = {f"run_1/self_attn/{name}_proj/kernel" for name in "qkvo"} | {"run_1/input_layernorm/weight"}
  phi = {f"run_1/self_attn/{name}/{part}" for name in ("feature_map", "feature_map_kv") for part in ("kernel", "bias")}
  assert _reached(ours) == attention | phi and not _reached(theirs)

  def loss(weight, hidden_weight):
    def of(params, teacher_params):
      how = Teacher(teacher_params, teacher, weight, hidden_weight)
      return language_model_loss(student, params, batch, teacher=how).loss

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(params, teacher_params)

  (nll, plain), (more, both) = loss(0.0, 0.0), loss(0.0, 2.0)
  streams = jax.tree.map(lambda x, y: x - y, both[0], plain[0])
  inputs = _inputs(batch)
  error = _streams_error(student, params, teacher, teacher_params, inputs)
  weights = np.ones(error.shape) if inputs[1] is None else batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
  np.testing.assert_allclose(more - nll, 2 * (error * weights).sum(), rtol=1e-4)
  assert not _reached(both[1]) and not _reached(plain[1])
  assert "norm/weight" not in _reached(streams) and {"run_0/mlp/down_proj/kernel", *phi} < _reached(streams)


def test_without_linear_layers_there_is_nothing_to_transfer_to(models, batch):
  _, (teacher, teacher_params), _ = models
  with pytest.raises(ValueError, match="No layer to transfer attention to"):
    jax.jit(attention_error, static_argnums=(0, 2))(teacher, teacher_params, teacher, teacher_params, *_inputs(batch))
