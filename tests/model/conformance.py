"""What holds for every mixer, and how it is tried: a mixer is tested by being registered.

One token after another, each document alone, is the yardstick of all ways to read; `test_conformance.py` runs all of it
over the registry.
"""

import dataclasses
import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.model import presets
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.t2r import T2R
from supra_jax.model.registry import layer, layers
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer

ROWS, WIDTH = 3, 8  # of one call
TIME = 2 * WIDTH
DOCUMENTS = ROWS * TIME  # at most: each token its own

TINY = presets.tiny()
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
# Models to try a mixer in: every kind of norm, RoPE, head and option once. A mixer that is not here is tried in two
# layers of the tiny preset.
EXAMPLES: dict[str, list[ModelConfig]] = {
  "softmax": [
    TINY.replace(
      layers=layers(("softmax",) * 2),
      sliding_window=5,
      norm="layer_norm",
      rope=RopeConfig(scaling="llama3", factor=8.0, original_max_positions=32),
      qk_norm="head",
      value_head_dim=4,
      tie_embeddings=True,
      **BIASES,
    )
  ],
  "supra": [
    TINY,
    TINY.replace(
      layers=layers(("supra", "softmax"), feature_map="per_head", decay="retnet", qk_norm=True),
      norm="layer_norm_gain",
      rope=RopeConfig(scaling="linear", factor=2.0),
      value_head_dim=12,
    ),
  ],
  "supra_window": [
    TINY.replace(
      layers=layers(("softmax", "supra_window"), decay="none", window=3, sinks=2),
      num_heads=2,
      qk_norm="all_heads",
      post_embed_norm=True,
      value_head_dim=4,
      sliding_window=7,
      tie_embeddings=True,
      **BIASES,
    ),
    TINY.replace(
      # Two windows in one model.
      layers=(
        layer("supra_window", feature_map="per_head_separate", decay_start=0.3, qk_norm=True, window=1, sinks=1),
        layer("supra_window", window=4, sinks=0),
      ),
      num_heads=5,
      num_kv_heads=1,
      norm="layer_norm",
      max_positions=6,
      rope=RopeConfig(scaling="yarn", factor=4.0, attention_factor=1.1, kind="interleaved"),
    ),
  ],
}


# Rounding to bfloat16 would let near ties of what is retained fall otherwise.
_EXACT = {"state_dtype": "float32"}
EXAMPLES["memory"] = [
  TINY.replace(layers=(layer("memory", window=2, retained=(2,), sinks=1, chunk=3, **_EXACT), layer("softmax"))),
  TINY.replace(
    layers=(
      layer("memory", window=1, retained=(3, 0), sinks=0, chunk=1, **_EXACT),
      layer("memory", window=3, retained=(1, 2), sinks=2, chunk=4, **_EXACT),
    ),
    num_heads=4,
    num_kv_heads=2,
    value_head_dim=4,
    max_positions=6,  # the first layer meets tokens that are further away
  ),
]

EXAMPLES["t2r"] = [
  TINY.replace(layers=layers(("t2r", "softmax"), **T2R)),
  # The paper's listing. Without RoPE, since a sum of weights near 0 would make rounding large: see test_t2r.py.
  TINY.replace(
    layers=(layer("t2r", rope=False), layer("t2r", rope=False, decay="retnet", normaliser="epsilon", qk_norm=True)),
    norm="layer_norm_gain",
    value_head_dim=12,
  ),
]
EXAMPLES["linear_transformer"] = [
  TINY.replace(layers=(layer("linear_transformer"), layer("linear_transformer", decay="lightning"))),
  TINY.replace(layers=layers(("linear_transformer", "softmax")), num_heads=4, num_kv_heads=2, value_head_dim=4),
  TINY.replace(layers=(layer("linear_transformer", rope=True), layer("linear_transformer", rope=True, decay="retnet"))),
]

EXAMPLES["mamba"] = [
  TINY.replace(layers=layers(("mamba",) * 2)),
  TINY.replace(
    layers=(layer("mamba", state_size=3, conv_kernel=1, expand=3, use_bias=True), layer("softmax")), norm="layer_norm"
  ),
  TINY.replace(layers=(layer("mamba", conv_kernel=TIME, time_step_rank=5, use_conv_bias=False),)),
]

EXAMPLES["lolcats"] = [
  TINY.replace(
    layers=(layer("softmax"), layer("lolcats", window=3)), qk_norm="head", sliding_window=7, value_head_dim=4, **BIASES
  ),
  TINY.replace(
    # The second layer's window is longer than a call.
    layers=(layer("lolcats", window=1), layer("lolcats", window=11)),
    num_heads=4,
    num_kv_heads=2,
    norm="layer_norm",
    rope=RopeConfig(kind="interleaved"),
  ),
]


def examples(mixer: str) -> list[ModelConfig]:
  return EXAMPLES.get(mixer) or [presets.tiny(mixer)]


def assert_close(got, want, tol=1e-4):
  """Within `tol` of the largest value, or of 1; leaf by leaf."""
  got, want = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, want))
  assert got.keys() == want.keys()
  for path, x in want.items():
    scale = max(1.0, float(np.abs(x).max()))
    assert got[path].shape == x.shape
    np.testing.assert_allclose(got[path], x, rtol=0, atol=tol * scale, err_msg=jax.tree_util.keystr(path))


@dataclasses.dataclass
class Case:
  """A model, its parameters, and the programs that were compiled of it."""

  model: Transformer
  params: Any
  cotangent: np.ndarray  # of the logits of every document, and of what each would say next
  compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

  def run(self, form, mask, *args, model=None, grad=True, **static):
    """Logits and those of one more token, in the order of documents; the gradients of their product with cotangents."""
    model = model or self.model

    def objective(params, mask, *args):
      logits, more = form(model, params, *args, **static)
      logits_mask, more_mask = mask
      logits, more = jnp.where(logits_mask[..., None], logits, 0), jnp.where(more_mask[:, None], more, 0)
      joined = jnp.concatenate([logits, more[:, None]], axis=1)
      return jnp.vdot(joined, self.cotangent), joined

    if (key := (form, model, grad, *sorted(static.items()))) not in self.compiled:
      run = jax.value_and_grad(objective, has_aux=True) if grad else lambda *args: (objective(*args), None)
      self.compiled[key] = jax.jit(run)
    (_, out), grads = self.compiled[key](self.params, mask, *args)
    return {"out": out, "grads": grads} if grad else {"out": out}


@functools.cache
def make_case(config: ModelConfig, random_params) -> Case:
  cotangent = np.random.default_rng(1).standard_normal((DOCUMENTS, TIME + 1, config.vocab_size), np.float32)
  return Case(Transformer(config), random_params(config), cotangent)


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


def fixed_layout():
  rng = np.random.default_rng(7)
  # Row 0: a full call and a short one, row 1 empty and then full, row 2 the other way round.
  lengths = np.array([[WIDTH, 0, WIDTH - 3], [5, WIDTH, 0]], np.int32)
  ids = np.array([[4] * 3 + [9] * 7 + [4] * 6, [0] * 5 + [1] + [0] * 10, [2] * 4 + [5] * 12], np.int32)
  return Layout(rng.integers(0, TINY.vocab_size, (ROWS, TIME), np.int32), ids, lengths, rng)


# Forms: ways to read. Each returns logits [documents, T, vocabulary], and [documents, vocabulary] of one more token
# that goes on from the state.
NEXT = 5


def one_by_one(model, params, tokens, lengths):
  def step(state, token_B):
    logits, state = model.apply({"params": params}, token_B[:, None], state, method="logits")
    more, _ = model.apply({"params": params}, jnp.full_like(token_B, NEXT)[:, None], state, method="logits")
    return state, (logits[:, 0], more[:, 0])

  _, (logits, more) = jax.lax.scan(step, model.init_state(len(tokens), TIME + 1), tokens.T)
  return logits.swapaxes(0, 1), more[jnp.maximum(lengths - 1, 0), jnp.arange(len(tokens))]


def in_pieces(model, params, tokens, lengths, *, cuts):
  del lengths  # all are TIME
  state, pieces = model.init_state(len(tokens), TIME + 1), []
  for piece in jnp.split(tokens, cuts, axis=1):
    logits, state = model.apply({"params": params}, piece, state, method="logits")
    pieces.append(logits)
  more, _ = model.apply({"params": params}, jnp.full_like(tokens[:, :1], NEXT), state, method="logits")
  return jnp.concatenate(pieces, axis=1), more[:, 0]


def at_once(model, params, tokens, lengths):
  """Without a state before the tokens."""
  del lengths
  logits, state = model.apply({"params": params}, tokens, method="logits")
  grown = state.grow(TIME + 1)
  more, _ = model.apply({"params": params}, jnp.full_like(tokens[:, :1], NEXT), grown, method="logits")
  return logits, more[:, 0]


def in_rows(model, params, calls, where, *, paddings, segments):
  if model.stacked:
    params = stack_layers(params, model.config)
  state, outs = model.init_state(ROWS, TIME + 1), []
  for (tokens, segment_ids, lengths), padding in zip(calls, paddings, strict=True):
    given = {"lengths": lengths, "segment_ids": segment_ids if segments else None, "padding": padding}
    logits, state = model.apply({"params": params}, tokens, state, method="logits", **given)
    outs.append(logits)
  more, _ = model.apply({"params": params}, jnp.full((ROWS, 1), NEXT), state, method="logits")
  row_of, column_of, rows = where
  return jnp.concatenate(outs, axis=1)[row_of, column_of], more[rows, 0]


def check_rows(case, layout, *, paddings, segments, model=None, grad, grad_tol=1e-4):
  calls = layout.calls(paddings)
  tokens, where, mask, length = layout.documents(paddings, segments)
  want = case.run(one_by_one, mask, tokens, length)
  got = case.run(in_rows, mask, calls, where, model=model, paddings=paddings, segments=segments, grad=grad)
  assert_close(got["out"], want["out"])
  if grad:
    assert_close(got["grads"], want["grads"], grad_tol)


def whole_documents():
  tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (DOCUMENTS, TIME), np.int32)
  return (np.ones((DOCUMENTS, TIME), bool), np.ones(DOCUMENTS, bool)), tokens, np.full(DOCUMENTS, TIME, np.int32)
