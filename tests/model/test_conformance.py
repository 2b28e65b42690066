"""Every mixer of the registry against what `conformance` says holds for all; and the same for a toy registered here."""

import dataclasses
import functools
import re
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.core.sharding import make_mesh, put_batch
from supra_jax.inference.engine import generate_tokens
from supra_jax.inference.lm import LM
from supra_jax.inference.parameters import for_inference
from supra_jax.linearization.hybrid import layer_divergences
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Identity
from supra_jax.model import costs, presets
from supra_jax.model.adapters import AdapterConfig
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.base import Projections
from supra_jax.model.placement import param_shardings, parameter_axes, parameter_name, state_shardings
from supra_jax.model.registry import MIXER, layers, mixer_class, mixer_names
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.optimizer import OptimizerConfig
from supra_jax.training.plan import plan
from supra_jax.training.setup import make_train_step
from tests.model import toy_mixer  # noqa: F401  # registers itself
from tests.model.conformance import (
  TIME,
  assert_close,
  at_once,
  check_rows,
  examples,
  fixed_layout,
  in_pieces,
  layouts,
  make_case,
  one_by_one,
  whole_documents,
)
from tests.support import programs

MESH = "data:2,fsdp:2,tensor:2"
pytestmark = pytest.mark.usefixtures("quick_compilation")
MIXERS = mixer_names()
# A mixer's further models have other options of the model, each of which some mixer's first model has.
IN_MODELS = [
  pytest.param(c, id=f"{mixer}{i or ''}", marks=[pytest.mark.slow] * (i > 0))
  for mixer in MIXERS
  for i, c in enumerate(examples(mixer))
]
mixers = pytest.mark.parametrize("mixer", MIXERS)
in_models = pytest.mark.parametrize("config", IN_MODELS)


@in_models
def test_parallel_is_recurrent_in_any_pieces(config, random_params):
  case, args = make_case(config, random_params), whole_documents()
  want = case.run(one_by_one, *args)
  got = case.run(in_pieces, *args, cuts=())
  assert_close(got["out"], want["out"])
  # In float32 sums over documents round by more than a logit does.
  assert_close(got["grads"], want["grads"], 3e-4)
  assert_close(case.run(in_pieces, *args, cuts=(6, 7), grad=False)["out"], want["out"])


@in_models
def test_keys_and_values_in_fewer_bits(config, random_params):
  """A sequence is rounded as a state is: both forms agree far beyond what rounding changes."""
  case, args = make_case(config, random_params), whole_documents()
  fewer = case.model.clone(state_dtype=jnp.bfloat16)
  exact = case.run(at_once, *args, grad=False)["out"]
  steps, sequence = (case.run(form, *args, model=fewer, grad=False)["out"] for form in (one_by_one, at_once))
  # A median, since a key that rounding in float32 moves across a tie of bfloat16 is off by 1/256.
  apart, moved = (float(np.median(np.abs(sequence - other))) for other in (steps, exact))
  holds_keys = any("k" in mixer_class(mixer).STATE_AXES for mixer in config.mixers)
  assert apart < 1e-5 and (moved > 100 * apart if holds_keys else moved == 0), (apart, moved)
  held = jax.eval_shape(lambda: fewer.init_state(1, TIME)).layers
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
  assert size == costs.state_bytes(config, TIME, jnp.bfloat16) == costs.row_bytes(fewer, TIME)
  assert (costs.row_bytes(case.model, TIME) > size) == holds_keys


@in_models
def test_packed_and_padded_is_alone(config, random_params):
  """Documents share rows, rows are padded on either side, and go on in a second call."""
  case, paddings = make_case(config, random_params), ("left", "right")
  check_rows(case, fixed_layout(), paddings=paddings, segments=True, grad=True)
  check_rows(case, fixed_layout(), paddings=("right", "left"), segments=False, grad=False)

  @hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
  @hypothesis.given(layouts())
  def check(layout):
    # GroupNorm undoes the scale of a one-token document: what is left of its gradient is mostly rounding.
    check_rows(case, layout, paddings=paddings, segments=True, grad=True, grad_tol=1e-2)

  check()


def _params(config: ModelConfig):
  init = functools.partial(Transformer(config).init, method="logits")
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@mixers
def test_facts(mixer):
  """NEW, AXES, PARTS, STATE_AXES and GROWS say what the module does."""
  cls, found = mixer_class(mixer), set()
  for config in examples(mixer):
    for number, told in enumerate(config.layers):
      if told.mixer != mixer:
        continue
      softmax = _params(config.replace(layers=layers(("softmax",))))["layers_0"]["self_attn"]
      attention = _params(config)[f"layers_{number}"]["self_attn"]
      for path, leaf in jax.tree_util.tree_leaves_with_path(attention):
        name = parameter_name(path)
        is_new = name.partition("/")[0] not in softmax
        assert bool(cls.NEW and re.search(cls.NEW, name)) == is_new, name
        own = [line for line in cls.AXES if len(line[1]) == leaf.ndim and re.fullmatch(line[0], name)]
        found |= {regex for regex, _ in own}
        # Sharding looks a parameter up by name among the lines of all mixers.
        pooled = [axes for regex, axes in parameter_axes() if re.fullmatch(regex, f"{MIXER}/{name}")]
        assert {axes for axes in pooled if len(axes) == leaf.ndim} == {axes for _, axes in own}, name
        if not is_new:
          assert leaf.shape == softmax[path[0].key][path[1].key].shape, name
      module = cls(config, told)
      small, large = (jax.eval_shape(functools.partial(module.init_state, 2, n)) for n in (3, 9))
      assert (jax.tree.map(jnp.shape, small) != jax.tree.map(jnp.shape, large)) == cls.GROWS
      assert (small.capacity, large.capacity) == ((3, 9) if cls.GROWS else (None, None))
      fields = {field.name: getattr(small, field.name) for field in dataclasses.fields(small)}
      assert sorted(name for names in cls.PARTS.values() for name in names) == sorted(fields)
      assert cls.STATE_AXES.keys() == fields.keys()
      for name, axes in cls.STATE_AXES.items():
        shape = dict(zip(axes, fields[name].shape, strict=True))
        assert shape["batch"] == 2, name
        # A memory cuts its heads in repeats of a pattern.
        assert config.num_heads % shape.get("heads", 1) == 0, name
  assert found == {regex for regex, _ in cls.AXES}, "AXES of no parameter"


@mixers
def test_a_config_in_json(mixer):
  for config in examples(mixer):
    assert ModelConfig.from_json(config.to_json()) == config


@in_models
def test_parameters_for_inference(config, random_params):
  """In one call and in steps the model is the same; a mixer whose phi is behind a bare projection has no W left."""
  params = random_params(config)
  folded = for_inference(config, params)
  model, tokens = Transformer(config), np.random.default_rng(0).integers(0, config.vocab_size, (2, 5), np.int32)

  def read(params):
    logits, _ = model.apply({"params": params}, tokens, method="logits")
    return logits, one_by_one(model, params, tokens, np.array([5, 5]))

  want, got = jax.jit(read)(params), jax.jit(read)(folded)
  assert_close(got, want, 1e-5)
  for number, told in enumerate(config.layers):
    left = any("kernel" in tree for name, tree in folded[f"layers_{number}"][MIXER].items() if "feature_map" in name)
    folds = told.mixer in ("supra", "t2r")
    assert left == (told.mixer == "supra_window" or (folds and config.qk_norm != "none"))
  jax.tree.map(np.testing.assert_array_equal, for_inference(config, folded), folded)


@mixers
def test_flops_are_those_of_the_program(mixer):
  """A decoding step of a model so wide that what is no product hardly counts, as XLA counts it."""
  wide = presets.tiny(mixer).replace(hidden_size=384, intermediate_size=384, num_heads=6, num_kv_heads=2, head_dim=64)
  model = Transformer(wide, implementation="recurrent")
  tokens, state = jnp.zeros((1, 1), jnp.int32), jax.eval_shape(lambda: model.init_state(1, 1))
  lowered = jax.jit(functools.partial(model.apply, method="logits")).lower({"params": _params(wide)}, tokens, state)
  counted = lowered.cost_analysis()["flops"]
  window = getattr(wide.layers[0], "window", 0) + getattr(wide.layers[0], "sinks", 0)
  # A window's slots are multiplied whether or not they hold a token yet.
  assert counted == pytest.approx(costs.train_flops_per_token(wide, max(window, 1)) / 3, rel=0.2)


@in_models
def test_states_are_taken_put_and_grown(config, random_params):
  """Rows go on alone, forked, in another order and in another batch as they would have."""
  case = make_case(config, random_params)
  read = jax.jit(functools.partial(case.model.apply, {"params": case.params}, method="logits"))
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, TIME), np.int32)
  lengths = np.array([5, TIME, 1, 7], np.int32)
  _, state = read(tokens, case.model.init_state(4, TIME), lengths=lengths)
  _, other = read(tokens[::-1], case.model.init_state(4, TIME + 9))
  want = np.asarray(read(tokens[:, :1], state.grow(TIME + 1))[0])

  rows = np.array([2, 0, 0, 3])
  got, _ = read(tokens[rows, :1], state.grow(TIME + 1).take(rows))
  np.testing.assert_allclose(got, want[rows], atol=1e-5)
  mixed = other.put(np.array([3, 1]), state.take(np.array([0, 2])))
  got, before = (np.asarray(read(tokens[[1, 2, 3, 0], :1], held)[0]) for held in (mixed, other))
  np.testing.assert_allclose(got[[3, 1]], want[[0, 2]], atol=1e-5)
  np.testing.assert_allclose(got[[0, 2]], before[[0, 2]], atol=1e-5)


@mixers
def test_linearised_saved_loaded_measured_and_decoded(mixer, random_params, tmp_path):
  teacher = presets.tiny("softmax").replace(vocab_size=96)
  params = random_params(teacher)
  told = next(told for config in examples(mixer) for told in config.layers if told.mixer == mixer)
  if mixer_class(mixer).begin is None:
    with pytest.raises(ValueError, match=f"The mixer '{mixer}' cannot take over a trained layer"):
      linearize(params, teacher, Identity(), mixer=told)
    return
  made = linearize(params, teacher, Identity(), mixer=told, layers=[1])
  assert made.config.mixers == ("softmax", mixer)
  attention = made.params["layers_1"]["self_attn"]
  for name, tree in params["layers_1"]["self_attn"].items():
    if name in attention:  # a mixer that is no `Projections` has others
      jax.tree.map(np.testing.assert_array_equal, attention[name], tree)
  assert jax.tree.map(jnp.shape, made.params) == jax.tree.map(lambda x: x.shape, _params(made.config))

  save_model(tmp_path / "model", config=made.config, params=made.params, tokenizer_files={}, source=made.report)
  stored = load_model(tmp_path / "model")
  assert stored.config == made.config
  lm, prompt = LM(stored.config, stored.params), np.random.default_rng(0).integers(0, 96, 13).tolist()
  new = list(generate_tokens(lm.model, lm.params, prompt, max_new_tokens=11))
  logits, _ = lm(np.array([prompt + new]))
  assert np.asarray(logits[0, 12:-1]).argmax(-1).tolist() == new

  parts = costs.state_bytes_by_part(made.config, 10)
  assert set(parts) == {"cache", *mixer_class(mixer).PARTS} and sum(parts.values()) == costs.state_bytes(
    made.config, 10
  )
  mesh = make_mesh("data:1", jax.devices()[:1])
  batch = {"tokens": np.random.default_rng(1).integers(0, 96, (2, 17)).astype(np.int32)}
  with jax.set_mesh(mesh):
    measured = layer_divergences((params, teacher), (made.params, made.config), [batch], mesh)
  assert list(measured.by_layer) == [1] and abs(measured.by_layer[1]) < 1e-5 < measured.student


@mixers
def test_planned(mixer):
  config = TrainConfig("", DataConfig(input="x", sequence_length=32), batch_size=2, num_steps=2, preset="tiny")
  made = plan(config, presets.tiny(mixer), make_mesh("data:1", jax.devices()[:1]))
  new = mixer_class(mixer).NEW
  assert made.parameters > made.new and (made.new > 0) == bool(new)


def _read(config, params, mesh):
  """Loss, gradients and the logits that decoding has after it, of stacked layers and rows of documents."""
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 32)).astype(np.int32)
  ids = np.repeat(np.arange(4, dtype=np.int32), 8)[None].repeat(8, 0)
  model = Transformer(config, stacked=True, remat="block")

  def loss(params):
    variables = {"params": stack_layers(params, config)}
    logits, state = model.apply(variables, tokens, model.init_state(8, 40), segment_ids=ids, method="logits")
    if "memory" in config.mixers:
      state = jax.lax.stop_gradient(state)  # on this mesh it would be wrong with jax 0.10.2, see BUILD_NOTES.md
    if mesh is not None:
      state = jax.lax.with_sharding_constraint(state, state_shardings(state, config, mesh))
    more, _ = model.apply(variables, tokens[:, :8], state, method="logits")
    return (logits**2).mean() + (more**2).mean(), (logits, more)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def _stepped(config, params, mesh):
  """Parameters after two steps of the project's own training, with adapters, new weights at a rate of their own."""
  mixer = mixer_class(config.mixers[-1])
  new = bool(mixer.NEW)
  adapted = (
    AdapterConfig(rank=2)
    if issubclass(mixer, Projections)
    else AdapterConfig(rank=2, kernels="mlp/" if mixer.FEEDS else "_proj/")
  )
  recipe = TrainConfig(
    "",
    DataConfig(input="x", sequence_length=32),
    batch_size=8,
    num_steps=2,
    new_weights_rate=0.5 if new else 1.0,
    adapters=adapted,
    optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0),
  )
  rng = np.random.default_rng(2)
  batch = {"tokens": rng.integers(0, config.vocab_size, (8, 33)).astype(np.int32)}
  batch["segment_ids"] = np.repeat(np.arange(3, dtype=np.int32), 11)[None].repeat(8, 0)
  with jax.set_mesh(mesh):
    step = make_train_step(recipe, config)
    shardings = jax.tree.map(lambda x: x.sharding, step.state_shapes(mesh))
    state = jax.jit(lambda params: step.init(stack_layers(params, config)), out_shardings=shardings)(params)
    run = step.compiled(shardings, recipe.active_groups(1))
    for _ in range(2):
      state, metrics = run(state, put_batch(batch, mesh))
    assert metrics["skipped"] == 0
    return jax.device_get(state.params)


def main():
  """In a process with eight devices: each mixer on meshes is what it is on one device."""
  from tests.conftest import _random_params

  jax.config.update("jax_disable_most_optimizations", True)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  for mixer in sys.argv[1:]:
    config = presets.tiny(mixer).replace(num_heads=4, hidden_size=64, vocab_size=96)
    if mixer == "supra_window":
      config = config.replace(layers=layers((mixer,) * 2, window=5, sinks=2, feature_map="per_head"), max_positions=16)
    elif mixer == "memory":  # a stack of layers that differ
      told = {"window": 4, "chunk": 3, "state_dtype": "float32"}
      config = config.replace(layers=sum((layers((mixer,), **told, retained=(size,)) for size in (5, 8)), ()))
    elif mixer == "lolcats":
      config = config.replace(layers=layers((mixer,) * 2, window=5))
    params = _random_params(config)
    want = _read(config, params, None)
    mesh = make_mesh("fsdp:2,context:2,tensor:2")
    with jax.set_mesh(mesh):
      jax.tree.map(close, _read(config, jax.device_put(params, param_shardings(params, mesh)), mesh), want)
    alone, cut = (_stepped(config, params, make_mesh(text, jax.devices()[:n])) for text, n in (("", 1), (MESH, 8)))
    # Adam divides a gradient by its own size: where that is rounding, so is the step, of 0.1 at most.
    far = jax.tree.map(lambda x, y: np.abs(x - y) > 1e-3, alone, cut)
    assert np.mean(np.concatenate([x.ravel() for x in jax.tree.leaves(far)])) < 1e-3


@mixers
def test_a_mesh_is_one_device(mixer):
  programs.succeeds_on_devices(8, "-m", "tests.model.test_conformance", mixer)


if __name__ == "__main__":
  main()
