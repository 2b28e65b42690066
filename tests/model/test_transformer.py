"""One model, many ways to read a text: all give the same logits, states and gradients.

The yardstick is the plainest way, one token after another through `init_state`, each document alone.
"""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from supra_jax.model.attention import LinearState

from supra_jax.model import attention, presets
from supra_jax.model.config import RopeConfig
from supra_jax.model.registry import layers
from supra_jax.model.stacking import runs, stack_runs, unstack
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, WIDTH = 3, 8  # of one call
TIME = 2 * WIDTH
DOCUMENTS = ROWS * TIME  # at most: each token its own

TINY = presets.tiny()
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
CASES = {
  "plain": TINY,
  "teacher": TINY.replace(
    layers=layers(("softmax",) * 2),
    sliding_window=5,
    norm="layer_norm",
    rope=RopeConfig(scaling="llama3", factor=8.0, original_max_positions=32),
    qk_norm="head",
    value_head_dim=4,
    tie_embeddings=True,
    **BIASES,
  ),
  "hybrid_grouped": TINY.replace(
    layers=layers(("supra", "softmax"), feature_map="per_head", decay="retnet", qk_norm=True),
    norm="layer_norm_gain",
    rope=RopeConfig(scaling="linear", factor=2.0),
    value_head_dim=12,
  ),
  "hybrid_ungrouped": TINY.replace(
    layers=layers(("softmax", "supra_window", "supra_window"), decay="none", window=3, sinks=2),
    num_heads=2,
    qk_norm="all_heads",
    post_embed_norm=True,
    value_head_dim=4,
    sliding_window=7,
    tie_embeddings=True,
    **BIASES,
  ),
  "one_group": TINY.replace(
    layers=layers(("supra_window",), feature_map="per_head_separate", decay_start=0.3, qk_norm=True, window=1, sinks=1),
    num_heads=5,
    num_kv_heads=1,
    norm="layer_norm",
    rope=RopeConfig(scaling="yarn", factor=4.0, attention_factor=1.1, kind="interleaved"),
  ),
}


@dataclasses.dataclass
class Case:
  model: Transformer
  params: Any
  cotangents: list[np.ndarray]  # of the logits and of each linear state, of every document
  compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

  def run(self, form, *args, model=None, grad=True, **static):
    """(logits, states) in the order of documents, and the gradients of their product with the cotangents."""
    model = model or self.model

    def objective(params, mask, *args):
      logits, states = form(model, params, *args, **static)
      logits_mask, states_mask = mask
      logits = jnp.where(logits_mask[..., None], logits, 0)
      states = [jnp.where(states_mask[:, None, None, None], s, 0) for s in states]
      total = sum(jnp.vdot(x, c) for x, c in zip([logits, *states], self.cotangents, strict=True))
      return total, (logits, states)

    if (key := (form, model, grad, *sorted(static.items()))) not in self.compiled:
      run = jax.value_and_grad(objective, has_aux=True) if grad else lambda *args: (objective(*args), None)
      self.compiled[key] = jax.jit(run)
    (_, out), grads = self.compiled[key](self.params, *args)
    return {"out": out, "grads": grads} if grad else {"out": out}


@functools.cache
def _make_case(name, random_params):
  c = CASES[name]
  rng = np.random.default_rng(1)
  state = (DOCUMENTS, c.num_heads, c.head_dim, c.value_width)
  logits = rng.standard_normal((DOCUMENTS, TIME, c.vocab_size), np.float32)
  states = [rng.standard_normal(state, np.float32) for mixer in c.mixers if mixer != "softmax"]
  return Case(Transformer(c), random_params(c), [logits, *states])


@pytest.fixture(scope="module", params=CASES)
def case(request, random_params):
  return _make_case(request.param, random_params)


@pytest.fixture(scope="module", params=["hybrid_grouped", "hybrid_ungrouped"])
def hybrid(request, random_params):
  return _make_case(request.param, random_params)


def _assert_close(got, want, tol=1e-4):
  """Within `tol` of the largest value, or of 1; leaf by leaf."""
  got, want = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, want))
  assert got.keys() == want.keys()
  for path, x in want.items():
    scale = max(1.0, float(np.abs(x).max()))
    assert got[path].shape == x.shape
    np.testing.assert_allclose(got[path], x, rtol=0, atol=tol * scale, err_msg=jax.tree_util.keystr(path))


def _linear(state):
  return [layer.s for layer in state.layers if isinstance(layer, LinearState)]


@dataclasses.dataclass
class Layout:
  """Rows of up to TIME tokens, read in two calls of WIDTH, and the documents they consist of."""

  tokens: np.ndarray  # [ROWS, TIME], real tokens first
  segment_ids: np.ndarray
  lengths: np.ndarray  # [2, ROWS], of either call
  rng: np.random.Generator

  def calls(self, paddings):
    """(tokens, segment_ids, lengths) of the two calls; padding holds rubbish."""
    out = []
    for call, padding in enumerate(paddings):
      tokens = self.rng.choice(np.array([-1, 10**6, 3], np.int32), (ROWS, WIDTH))
      segment_ids = self.rng.integers(0, 3, (ROWS, WIDTH), np.int32)
      for row, n in enumerate(self.lengths[call]):
        start = self.lengths[0, row] * call
        at = slice(WIDTH - n, WIDTH) if padding == "left" else slice(0, n)
        tokens[row, at] = self.tokens[row, start : start + n]
        segment_ids[row, at] = self.segment_ids[row, start : start + n]
      out.append((tokens, segment_ids, self.lengths[call]))
    return out

  def documents(self, paddings, by_segment):
    """Every document alone, and where its tokens and its final state are found.

    Returns:
      (tokens [DOCUMENTS, TIME], row and column of each token in the two calls' outputs side by side, row and mask of
      each final state, mask of the tokens, length of each document).
    """
    tokens = self.rng.integers(0, 50, (DOCUMENTS, TIME), np.int32)  # after its end a document may go on anyhow
    row_of, column_of = np.zeros((2, DOCUMENTS, TIME), np.int32)
    length, last = np.zeros(DOCUMENTS, np.int32), np.zeros(DOCUMENTS, bool)
    rows = np.zeros(DOCUMENTS, np.int32)
    document = -1
    for row, (first, second) in enumerate(self.lengths.T):
      for t in range(first + second):
        if t == 0 or (by_segment and self.segment_ids[row, t] != self.segment_ids[row, t - 1]):
          document += 1
          rows[document] = row
        call, at = (0, t) if t < first else (1, t - first)
        offset = WIDTH - self.lengths[call, row] if paddings[call] == "left" else 0
        n = length[document]
        tokens[document, n] = self.tokens[row, t]
        row_of[document, n], column_of[document, n] = row, call * WIDTH + offset + at
        length[document] += 1
      if first + second:
        last[document] = True
    mask = np.arange(TIME) < length[:, None]
    return tokens, (row_of, column_of, rows), (mask, last), length


@st.composite
def layouts(draw):
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  lengths = np.array(draw(st.lists(st.integers(0, WIDTH), min_size=2 * ROWS, max_size=2 * ROWS)), np.int32)
  # Few ids in runs: neighbours may or may not share one, at the cut as well, and ids come back.
  ids = [np.repeat(rng.integers(0, 3, TIME), draw(st.integers(1, TIME)))[:TIME] for _ in range(ROWS)]
  tokens = rng.integers(0, TINY.vocab_size, (ROWS, TIME), np.int32)
  return Layout(tokens, np.stack(ids).astype(np.int32), lengths.reshape(2, ROWS), rng)


def _fixed_layout():
  rng = np.random.default_rng(7)
  # Row 0: a full call and a short one, row 1 empty and then full, row 2 the other way round.
  lengths = np.array([[WIDTH, 0, WIDTH - 3], [5, WIDTH, 0]], np.int32)
  ids = np.array([[4] * 3 + [9] * 7 + [4] * 6, [0] * 5 + [1] + [0] * 10, [2] * 4 + [5] * 12], np.int32)
  return Layout(rng.integers(0, TINY.vocab_size, (ROWS, TIME), np.int32), ids, lengths, rng)


# Forms: ways to read. Each returns logits [documents, T, vocabulary] and linear states [documents, H, K, V].


def one_by_one(model, params, tokens, lengths):
  def step(state, token_B):
    logits, state = model.apply({"params": params}, token_B[:, None], state, method="logits")
    return state, (logits[:, 0], _linear(state))

  _, (logits, states) = jax.lax.scan(step, model.init_state(len(tokens), TIME), tokens.T)
  return logits.swapaxes(0, 1), [s[jnp.maximum(lengths - 1, 0), jnp.arange(len(tokens))] for s in states]


def in_pieces(model, params, tokens, lengths, *, cuts):
  del lengths  # all are TIME
  state, pieces = model.init_state(len(tokens), TIME) if cuts else None, []
  for piece in jnp.split(tokens, cuts, axis=1):
    logits, state = model.apply({"params": params}, piece, state, method="logits")
    pieces.append(logits)
  return jnp.concatenate(pieces, axis=1), _linear(state)


def in_rows(model, params, calls, where, *, paddings, segments):
  if model.stacked:
    params = stack_runs(params, model.config)
  state, outs = model.init_state(ROWS, TIME), []
  for (tokens, segment_ids, lengths), padding in zip(calls, paddings, strict=True):
    given = {"lengths": lengths, "segment_ids": segment_ids if segments else None, "padding": padding}
    logits, state = model.apply({"params": params}, tokens, state, method="logits", **given)
    outs.append(logits)
  row_of, column_of, rows = where
  return jnp.concatenate(outs, axis=1)[row_of, column_of], [s[rows] for s in _linear(state)]


def _check_rows(case, layout, *, paddings, segments, model=None, grad, grad_tol=1e-4):
  calls = layout.calls(paddings)
  tokens, where, mask, length = layout.documents(paddings, segments)
  want = case.run(one_by_one, mask, tokens, length)
  got = case.run(in_rows, mask, calls, where, model=model, paddings=paddings, segments=segments, grad=grad)
  _assert_close(got["out"], want["out"])
  if grad:
    _assert_close(got["grads"], want["grads"], grad_tol)


def _whole_documents():
  tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (DOCUMENTS, TIME), np.int32)
  return (np.ones((DOCUMENTS, TIME), bool), np.ones(DOCUMENTS, bool)), tokens, np.full(DOCUMENTS, TIME, np.int32)


def test_parallel_is_recurrent(case):
  args = _whole_documents()
  _assert_close(case.run(in_pieces, *args, cuts=()), case.run(one_by_one, *args))


def test_cut_anywhere(hybrid):
  args = _whole_documents()
  want = hybrid.run(one_by_one, *args)
  _assert_close(hybrid.run(in_pieces, *args, cuts=(6, 7), grad=False)["out"], want["out"])


def test_packed_and_padded_is_alone(case):
  paddings = ("left", "right")
  _check_rows(case, _fixed_layout(), paddings=paddings, segments=True, grad=True)

  @hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
  @hypothesis.given(layouts())
  def check(layout):
    # GroupNorm undoes the scale of a one-token document: what is left of its gradient is mostly rounding.
    _check_rows(case, layout, paddings=paddings, segments=True, grad=True, grad_tol=1e-2)

  check()


def test_padded_is_alone(hybrid):
  """As above without segment ids: the second call goes on with the first's document."""
  _check_rows(hybrid, _fixed_layout(), paddings=("right", "left"), segments=False, grad=False)


def test_stacked_is_unstacked(random_params):
  """Runs as scans, with rematerialised blocks, as training has them; here from state to state as well."""
  case = _make_case("hybrid_ungrouped", random_params)
  model = case.model.clone(stacked=True, remat="block")
  _check_rows(case, _fixed_layout(), paddings=("left", "right"), segments=True, model=model, grad=True)


def test_remat_changes_nothing(random_params):
  case, args = _make_case("one_group", random_params), _whole_documents()
  model = case.model.clone(remat="block")
  _assert_close(case.run(in_pieces, *args, model=model, cuts=()), case.run(one_by_one, *args))


def test_counters_of_the_state(random_params):
  """Tokens cached, position and document after each call, worked out by hand from the layout."""
  case, layout = _make_case("plain", random_params), _fixed_layout()
  state, got = case.model.init_state(ROWS), []
  apply = jax.jit(functools.partial(case.model.apply, padding="left"))
  for tokens, segment_ids, lengths in layout.calls(("left", "left")):
    _, state = apply({"params": case.params}, tokens, state, lengths=lengths, segment_ids=segment_ids)
    got.append([np.asarray(x).tolist() for x in (state.cached, state.position, state.segment)])
  assert got == [[[8, 0, 5], [5, 0, 1], [9, -1, 5]], [[13, 8, 5], [3, 2, 1], [4, 0, 5]]]


def test_implementations_agree(random_params):
  """Over several chunks, padding in one row and documents in all."""
  case, time = _make_case("one_group", random_params), 150
  tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, time), np.int32)
  segment_ids = np.repeat(np.array([[3, 1, 1], [0, 2, 0]], np.int32), time // 3, axis=1)
  lengths = np.array([time, 110], np.int32)

  def run(implementation):
    model = case.model.clone(implementation=implementation)
    apply = functools.partial(model.apply, method="logits", padding="left")
    logits, state = jax.jit(apply)({"params": case.params}, tokens, lengths=lengths, segment_ids=segment_ids)
    return jnp.where((np.arange(time) >= time - lengths[:, None])[..., None], logits, 0), _linear(state)

  want = run("recurrent")
  _assert_close(run("reference"), want)
  _assert_close(run("chunked_xla"), want)
  with pytest.raises(ValueError, match="no_such_thing"):
    run("no_such_thing")


@pytest.mark.parametrize("name", ["teacher", "hybrid_grouped"])
def test_unstack_undoes_stack_runs(name, random_params):
  c = CASES[name].replace(layers=layers(("supra", "supra", "softmax", "supra_window", "softmax", "softmax"), sinks=0))
  params = random_params(c)
  stacked = stack_runs(params, c)
  assert runs(c.mixers) == [(0, 2), (2, 1), (3, 1), (4, 2)]
  assert {key for key in stacked if key.startswith("run_")} == {"run_0", "run_2", "run_3", "run_4"}
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = functools.partial(Transformer(c, stacked=True).init, method="logits")
  made = jax.eval_shape(init, jax.random.key(0), tokens)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, made["params"])
  back = unstack(stacked, c)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_full_cache_is_refused(random_params):
  case = _make_case("hybrid_grouped", random_params)
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
  case = _make_case("plain", random_params)
  assert case.model.init_state(1).capacity is None
  with pytest.raises(ValueError, match="padding='centre'"):
    case.model.apply({"params": case.params}, np.zeros((1, 2), np.int32), padding="centre")


def test_bfloat16(random_params):
  """bfloat16 throughout, but for logits and linear states, and not far from float32."""
  case = _make_case("hybrid_ungrouped", random_params)
  tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, TIME), np.int32)

  def run(params, dtype):
    model = case.model.clone(dtype=dtype)
    read = functools.partial(model.apply, {"params": params}, method="logits")
    logits, state = read(tokens[:, :-1], model.init_state(4, TIME))
    last, state = read(tokens[:, -1:], state)
    return jnp.concatenate([logits, last], 1), state

  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params)
  for params in (case.params, narrow):
    logits, state = jax.eval_shape(functools.partial(run, dtype=jnp.bfloat16), params)
    assert logits.dtype == jnp.float32
    for path, x in jax.tree_util.tree_leaves_with_path(state.layers):
      assert x.dtype == (jnp.float32 if path[-1].name == "s" else jnp.bfloat16)
  run = jax.jit(run, static_argnums=1)
  want = run(case.params, jnp.float32)[0]
  error = jnp.sqrt(jnp.square(run(narrow, jnp.bfloat16)[0] - want).mean() / jnp.square(want).mean())
  assert 1e-4 < error < 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_never_mix_by_accident(case, dtype, monkeypatch):
  """Under strict promotion; the op, which multiplies by masks, is left out."""
  for name in ("linear_attention", "linear_attention_step"):
    monkeypatch.setattr(attention, name, jax.numpy_dtype_promotion("standard")(getattr(attention, name)))
  monkeypatch.setattr(jnp, "promote_types", jax.numpy_dtype_promotion("standard")(jnp.promote_types))  # meant
  model = case.model.clone(dtype=dtype)
  tokens = np.zeros((ROWS, WIDTH), np.int32)
  lengths = np.full(ROWS, WIDTH, np.int32)
  with jax.numpy_dtype_promotion("strict"):
    for args in ({"lengths": lengths, "segment_ids": tokens, "padding": "left"}, {}):
      run = functools.partial(model.apply, {"params": case.params}, method="logits", **args)
      jax.eval_shape(run, tokens)
      jax.eval_shape(run, tokens, model.init_state(ROWS, WIDTH))
    jax.eval_shape(run, tokens[:, :1], model.init_state(ROWS, WIDTH))
