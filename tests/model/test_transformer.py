"""What the transformer does around its mixers; what holds for all mixers is in test_conformance.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model.mixers import supra
from supra_jax.model.registry import layers
from supra_jax.model.stacking import stack_layers, stacks, unstack_layers
from supra_jax.model.transformer import Transformer
from tests.model.conformance import (
  EXAMPLES,
  ROWS,
  TIME,
  TINY,
  WIDTH,
  assert_close,
  check_rows,
  fixed_layout,
  in_pieces,
  make_case,
  whole_documents,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_stacked_is_unstacked(random_params):
  """Runs as scans, with rematerialised blocks, as training has them; here from state to state as well."""
  case = make_case(EXAMPLES["supra_window"][0], random_params)
  model = case.model.clone(stacked=True, remat="block")
  check_rows(case, fixed_layout(), paddings=("left", "right"), segments=True, model=model, grad=True)


def test_remat_changes_nothing(random_params):
  # Each layer is wrapped alone.
  config = EXAMPLES["supra_window"][1]
  case, args = make_case(config.replace(layers=config.layers[:1]), random_params), whole_documents()
  model = case.model.clone(remat="block")
  assert_close(case.run(in_pieces, *args, model=model, cuts=()), case.run(in_pieces, *args, cuts=()))


def test_counters_of_the_state(random_params):
  """Tokens cached, position and document after each call, worked out by hand from the layout."""
  case, layout = make_case(TINY, random_params), fixed_layout()
  state, got = case.model.init_state(ROWS), []
  apply = jax.jit(functools.partial(case.model.apply, padding="left"))
  for tokens, segment_ids, lengths in layout.calls(("left", "left")):
    _, state = apply({"params": case.params}, tokens, state, lengths=lengths, segment_ids=segment_ids)
    got.append([np.asarray(x).tolist() for x in (state.cached, state.position, state.segment)])
  assert got == [[[8, 0, 5], [5, 0, 1], [9, -1, 5]], [[13, 8, 5], [3, 2, 1], [4, 0, 5]]]


def test_implementations_agree(random_params):
  """Over several chunks, padding in one row and documents in all."""
  case, time = make_case(EXAMPLES["supra_window"][1], random_params), 150
  tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, time), np.int32)
  segment_ids = np.repeat(np.array([[3, 1, 1], [0, 2, 0]], np.int32), time // 3, axis=1)
  lengths = np.array([time, 110], np.int32)

  def run(implementation):
    model = case.model.clone(implementation=implementation)
    apply = functools.partial(model.apply, method="logits", padding="left")
    logits, state = jax.jit(apply)({"params": case.params}, tokens, lengths=lengths, segment_ids=segment_ids)
    return jnp.where((np.arange(time) >= time - lengths[:, None])[..., None], logits, 0), [x.s for x in state.layers]

  want = run("recurrent")
  assert_close(run("reference"), want)
  assert_close(run("chunked_xla"), want)
  with pytest.raises(ValueError, match="no_such_thing"):
    run("no_such_thing")


@pytest.mark.parametrize("like", [EXAMPLES["softmax"][0], EXAMPLES["supra"][1]], ids=["softmax", "supra"])
def test_unstacked_is_as_before_stacking(like, random_params):
  c = like.replace(layers=layers(("supra", "supra", "softmax", "supra_window", "softmax", "softmax"), sinks=0))
  params = random_params(c)
  stacked = stack_layers(params, c)
  assert stacks(c.layers) == [(0, 2), (2, 1), (3, 1), (4, 2)]
  assert {key for key in stacked if key.startswith("run_")} == {"run_0", "run_2", "run_3", "run_4"}
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = functools.partial(Transformer(c, stacked=True).init, method="logits")
  made = jax.eval_shape(init, jax.random.key(0), tokens)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, made["params"])
  back = unstack_layers(stacked, c)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_full_cache_is_refused(random_params):
  case = make_case(EXAMPLES["supra"][1], random_params)
  tokens, variables = np.zeros((3, 4), np.int32), {"params": case.params}
  with pytest.raises(ValueError, match=r"hold 3 tokens and 4 are wanted.*capacity=4"):
    case.model.apply(variables, tokens, case.model.init_state(3, 3))
  run = jax.jit(case.model.apply)
  state = case.model.init_state(3, 6)
  _, state = run(variables, tokens, state, lengths=np.array([4, 2, 0], np.int32))
  hidden, state = run(variables, tokens, state, lengths=np.array([3, 4, 4], np.int32))
  assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1:]).all()
  hidden, state = run(variables, tokens[:, :1], state, lengths=np.array([0, 1, 1], np.int32))
  assert np.isnan(hidden[:2]).all() and np.isfinite(hidden[2]).all()  # what was lost stays lost
  with pytest.raises(ValueError, match="hold 6 tokens and 8 are wanted"):
    case.model.apply(variables, tokens[:, :1], state)


def test_unknown_padding_is_refused(random_params):
  case = make_case(TINY, random_params)
  assert case.model.init_state(1).capacity is None
  with pytest.raises(ValueError, match="padding='centre'"):
    case.model.apply({"params": case.params}, np.zeros((1, 2), np.int32), padding="centre")


def test_bfloat16(random_params):
  """bfloat16 throughout, but for logits and linear states, and not far from float32."""
  case = make_case(EXAMPLES["supra_window"][0], random_params)
  tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, TIME), np.int32)

  def run(params, dtype):
    model = case.model.clone(dtype=dtype)
    read = functools.partial(model.apply, {"params": params}, method="logits")
    logits, state = read(tokens[:, :-1], model.init_state(4, TIME))
    last, state = read(tokens[:, -1:], state)
    return jnp.concatenate([logits, last], 1), state

  jitted = jax.jit(run, static_argnums=1)
  want, _ = jitted(case.params, jnp.float32)
  got = jitted(jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params), jnp.bfloat16)
  for logits, state in (got, jax.eval_shape(functools.partial(run, dtype=jnp.bfloat16), case.params)):
    assert logits.dtype == jnp.float32
    for path, x in jax.tree_util.tree_leaves_with_path(state.layers):
      assert x.dtype == (jnp.float32 if path[-1].name == "s" else jnp.bfloat16)
  error = jnp.sqrt(jnp.square(got[0] - want).mean() / jnp.square(want).mean())
  assert 1e-4 < error < 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "config", [c for several in EXAMPLES.values() for c in several], ids=lambda c: "-".join(c.mixers)
)
def test_dtypes_never_mix_by_accident(config, dtype, monkeypatch, random_params):
  """Under strict promotion; the op, which multiplies by masks, is left out."""
  for name in ("linear_attention", "linear_attention_step"):
    monkeypatch.setattr(supra, name, jax.numpy_dtype_promotion("standard")(getattr(supra, name)))
  monkeypatch.setattr(jnp, "promote_types", jax.numpy_dtype_promotion("standard")(jnp.promote_types))  # meant
  case = make_case(config, random_params)
  model = case.model.clone(dtype=dtype)
  tokens = np.zeros((ROWS, WIDTH), np.int32)
  lengths = np.full(ROWS, WIDTH, np.int32)
  with jax.numpy_dtype_promotion("strict"):
    run, state = functools.partial(model.apply, {"params": case.params}, method="logits"), model.init_state(ROWS, WIDTH)
    args = {"lengths": lengths, "segment_ids": tokens, "padding": "left"}
    jax.eval_shape(run, tokens)
    jax.eval_shape(functools.partial(run, **args), tokens, state)
    jax.eval_shape(run, tokens[:, :1], state)
