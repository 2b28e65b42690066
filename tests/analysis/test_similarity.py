"""Attention matrices against the layers' outputs; measures against plain numpy; the result, its JSON and picture."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from supra_jax.analysis import similarity as analysis
from supra_jax.analysis.attention_matrices import attention_matrices
from supra_jax.analysis.pictures import plot_heads
from supra_jax.analysis.similarity import ANOTHER_TEXT, ITSELF, Similarity, compare
from supra_jax.inference.lm import LM
from supra_jax.model.config import RopeConfig
from supra_jax.model.layers import group_norm
from supra_jax.model.mixers.t2r import T2R
from supra_jax.model.presets import tiny
from supra_jax.model.registry import MIXER, layer, layers, mixer_class
from supra_jax.model.transformer import Block, Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = np.random.default_rng(5).integers(3, 97, (3, 13))
TINY = tiny()  # 6 query heads and 2 key/value heads
MODELS = {
  "softmax": TINY.replace(layers=layers(["softmax"] * 2)),
  "softmax, window, biases": TINY.replace(
    layers=layers(["softmax"] * 2), sliding_window=5, value_head_dim=4, qk_norm="head", qkv_bias=True, output_bias=True
  ),
  "softmax, RoPE by head": TINY.replace(
    layers=layers(["softmax"] * 2), num_kv_heads=6, rope=RopeConfig(kind="by_head")
  ),
  "supra": TINY,
  "supra, per head": TINY.replace(
    layers=layers(["softmax", "supra"], feature_map="per_head", decay="retnet", qk_norm=True),
    rope=RopeConfig(kind="interleaved"),
    value_head_dim=12,
  ),
  "t2r": TINY.replace(layers=(layer("t2r"), layer("t2r", **T2R))),
  "linear_transformer": TINY.replace(
    layers=(layer("linear_transformer"), layer("linear_transformer", decay="lightning"))
  ),
}
SOFTMAX, HYBRID = MODELS["softmax"], TINY.replace(layers=layers(["supra", "memory"]))


def entering(config, params, tokens_1T):
  """Yields (the layer's config and parameters, what enters the layer, context)."""
  model = Transformer(config)
  x, (context, _) = model.apply({"params": params}, tokens_1T, method="embed"), model.place(tokens_1T)
  for i, kind in enumerate(config.layers):
    own = params[f"layers_{i}"]
    yield kind, own, x, context
    x, _ = Block(config, kind).apply({"params": own}, x, None, context)


@pytest.mark.parametrize("name", MODELS)
def test_matrices_times_values_are_what_the_layer_computes(random_params, name):
  config = MODELS[name]
  params = random_params(config)
  found = list(attention_matrices(LM(config, params), TEXTS))
  assert [matrices.mixer for matrices in found] == list(config.mixers)
  for text in (0, 2):
    tokens = jnp.asarray(TEXTS[text : text + 1])
    for matrices, (kind, own, x, context) in zip(found, entering(config, params, tokens), strict=True):
      weights = matrices.of(text)
      assert weights.shape == (config.num_heads, TEXTS.shape[1], TEXTS.shape[1]) and weights.dtype == np.float32
      assert (np.triu(weights, 1) == 0).all()
      block = Block(config, kind).bind({"params": own})
      v = np.repeat(block.self_attn.project(block.input_layernorm(x))[2][0], config.num_heads // config.num_kv_heads, 1)
      out = np.einsum("hij,jhv->ihv", weights, v)
      if kind.mixer == "softmax":
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
      if kind.mixer == "supra":
        out = group_norm(jnp.asarray(out))
      w_o = own[MIXER]["o_proj"]
      out = np.reshape(out, (len(v), -1)) @ w_o["kernel"] + w_o.get("bias", 0)
      np.testing.assert_allclose(out, block.attend(x, None, context)[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", ["retnet", "none"])
def test_linear_attention_has_the_weights_of_the_equation(random_params, decay):
  """The GroupNorm hides a factor of L, so the test above does not see it."""
  config = TINY.replace(layers=layers(["supra"] * 2, decay=decay))
  params = random_params(config)
  kind, own, x, context = next(entering(config, params, jnp.asarray(TEXTS[:1])))
  block = Block(config, kind).bind({"params": own})
  q, k, _ = block.self_attn.project(block.input_layernorm(x))
  q, k = (np.asarray(y[0], np.float64) for y in block.self_attn.features(q, k, context))
  gamma = 1 - 2.0 ** -(5 + np.arange(6)) if decay == "retnet" else np.ones(6)
  at = np.arange(len(q))
  distance = at[:, None] - at
  dots = np.einsum("ihk,jhk->hij", q, np.repeat(k, 3, axis=1)) / np.sqrt(8)
  wanted = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0) * dots, 0)
  found = next(attention_matrices(LM(config, params), TEXTS[:1])).of(0)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_of_a_window_the_linear_attention_is_compared(random_params):
  config = TINY.replace(layers=layers(["supra_window"] * 2, window=4, sinks=1))
  params = random_params(config)
  first = next(attention_matrices(LM(config, params), TEXTS[:1]))
  kind, own, x, context = next(entering(config, params, jnp.asarray(TEXTS[:1])))
  mixer = mixer_class(kind.mixer)(config, kind).bind({"params": own[MIXER]})
  normed = Block(config, kind).bind({"params": own}).input_layernorm(x)
  out = np.einsum("hij,jhv->ihv", first.of(0), np.repeat(mixer.project(normed)[2][0], 3, 1))
  wanted = mixer.outputs(normed, None, context)[0]["linear_o_proj"]
  np.testing.assert_allclose(group_norm(jnp.asarray(out)).reshape(wanted[0].shape), wanted[0], atol=1e-4)


def test_a_text_is_read_as_the_model_reads_it(random_params):
  """The last layer's matrices of several texts, and of a model in bfloat16, are those of one text in float32."""
  config = MODELS["supra, per head"]
  params = random_params(config)
  *_, last = attention_matrices(LM(config, params), TEXTS, [1])
  *_, alone = attention_matrices(LM(config, params), TEXTS[1:2])
  assert last.layer == 1 and last.num_texts == 3
  np.testing.assert_array_equal(last.of(1), alone.of(0))
  with pytest.raises(IndexError, match="text=3: wanted 0 to 2"):
    last.of(3)
  short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  *_, wide = attention_matrices(LM(config, jax.tree.map(lambda x: x.astype(jnp.float32), short)), TEXTS)
  *_, narrow = attention_matrices(LM(config, short), TEXTS)
  np.testing.assert_allclose(narrow.of(0), wide.of(0), atol=1e-5)


def test_measures_are_those_of_plain_numpy():
  rng = np.random.default_rng(0)
  a, b = (np.tril(rng.standard_normal((2, 5, 5))) for _ in range(2))
  above = np.triu(rng.standard_normal((5, 5)), 1)
  at = np.tril_indices(5)
  wanted = [np.dot(a[h][at], b[h][at]) / np.linalg.norm(a[h][at]) / np.linalg.norm(b[h][at]) for h in range(2)]
  np.testing.assert_allclose(analysis.cosine_similarity(a + above, b - above), wanted)
  assert analysis.cosine_similarity(a, 0 * a).tolist() == [0, 0]
  np.testing.assert_allclose(analysis.cosine_similarity(a, -3 * a), -1)

  s, t = (np.sqrt(np.maximum(np.linalg.eigvalsh(x.transpose(0, 2, 1) @ x), 0))[:, ::-1] for x in (a, b))
  np.testing.assert_allclose(analysis.singular_values(a), s, atol=1e-7)
  wanted = [np.sqrt(((t[h] - s[h]) ** 2).sum() / (s[h] ** 2).sum()) for h in range(2)]
  np.testing.assert_allclose(analysis.singular_distance(s, t), wanted)
  # The singular values of a diagonal matrix are known: |(4, 2) - (3, 0)| / |(3, 0)|.
  known = analysis.singular_values(np.array([[[0, 0], [0, 3]], [[-2, 0], [0, 4]]]))
  np.testing.assert_allclose(analysis.singular_distance(known[:1], known[1:]), np.sqrt(5) / 3)


def test_rows_are_divided_by_the_size_of_their_sum():
  rows = np.array([[2.0, 0, 0], [-3, 1, 0], [0.1, 0.2, -0.3]], np.float32)
  zero = np.array([[0.0, 0, 0], [1, -1, 0], [1, 0, 1]], np.float32)
  divided = analysis.divided_by_row_sums(np.stack([rows, zero]))
  np.testing.assert_allclose(divided[0], [[1, 0, 0], [-1.5, 0.5, 0], rows[2]])  # the last sum is rounding alone
  np.testing.assert_allclose(divided[1], [[0, 0, 0], [1, -1, 0], [0.5, 0, 0.5]])


def test_compare(random_params, tmp_path, capsys):
  teacher, hybrid = LM(SOFTMAX, random_params(SOFTMAX)), LM(HYBRID, random_params(HYBRID))
  models = {"before": hybrid, "after": LM(TINY, random_params(TINY, 1)), "the same": teacher}
  found = compare(teacher, models, TEXTS[:, :9], progress=True)
  assert "Comparing, 2 of 2 layers" in capsys.readouterr().err
  assert (found.layers, found.num_texts, found.num_tokens) == ((0, 1), 3, 9)
  assert list(found.scores) == ["before", "after", "the same", ITSELF, ANOTHER_TEXT]
  assert found.skipped == {"before": {1: "memory"}, "after": {}, "the same": {}}
  for scores in (found.scores[ITSELF]["raw"], *found.scores["the same"].values()):
    np.testing.assert_allclose(scores.cosine, 1, atol=1e-6)
    np.testing.assert_allclose(scores.singular, 0, atol=1e-5)
  another = found.scores[ANOTHER_TEXT]["raw"]
  assert (another.cosine < 1).all() and (another.singular > 0).all()

  before = found.scores["before"]["row"]
  assert np.isnan(before.cosine[1]).all() and np.isfinite(before.cosine[0]).all()
  known = before.cosine[0]
  assert found.summary()["before"]["row"]["cosine"] == pytest.approx({"mean": known.mean(), "median": np.median(known)})
  theirs, ours = (next(attention_matrices(lm, TEXTS[:, :9])) for lm in (teacher, hybrid))
  pairs = [(theirs.of(text)[4], ours.of(text)[4]) for text in range(3)]
  wanted = [np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
  assert found.scores["before"]["raw"].cosine[0, 4] == pytest.approx(np.mean(wanted), abs=1e-5)

  again = Similarity.from_json(found.to_json())
  assert (again.layers, again.skipped, again.num_texts) == (found.layers, found.skipped, 3)
  assert list(again.scores) == list(found.scores)
  for name, forms in found.scores.items():
    for form, scores in forms.items():
      np.testing.assert_array_equal(again.scores[name][form].cosine, scores.cosine)
      np.testing.assert_array_equal(again.scores[name][form].singular, scores.singular)
  assert json.loads(found.to_json())["scores"]["before"]["raw"]["cosine"][1] == [None] * 6

  for measure, form in (("cosine", "raw"), ("singular", "row")):
    plot_heads(found, tmp_path / "heads.png", measure=measure, form=form, title="A title")
    drawn = matplotlib.image.imread(tmp_path / "heads.png")
    assert (drawn[..., :3] == 1).all(-1).mean() > 0.2  # white paper
    assert (np.abs(drawn[..., :3] - 0xD9 / 255) < 0.01).all(-1).sum() > 1000  # the layer that was skipped
  assert pyplot.get_fignums() == []


def test_one_text_and_some_layers(random_params, tmp_path):
  teacher = LM(SOFTMAX, random_params(SOFTMAX))
  found = compare(teacher, {"rnn": LM(TINY, random_params(TINY))}, TEXTS[:1], layers=[1])
  assert found.layers == (1,) and list(found.scores) == ["rnn", ITSELF]
  assert found.scores["rnn"]["raw"].cosine.shape == (1, 6)
  plot_heads(found, tmp_path / "heads.png", names=[ITSELF], measure="singular")
  with pytest.raises(ValueError, match="no scores to draw"):
    plot_heads(found, tmp_path / "none.png", names=[])
  with pytest.raises(ValueError, match="measure='angle'"):
    plot_heads(found, tmp_path / "none.png", measure="angle")


def test_refusals(random_params):
  teacher, rnn = LM(SOFTMAX, random_params(SOFTMAX)), LM(TINY, random_params(TINY))
  deep = LM(TINY.replace(layers=layers(["supra"] * 3)), rnn.params)
  broken = LM(TINY, jax.tree.map(lambda x: x * jnp.nan, rnn.params))
  for message, given, texts, how in (
    ("0 texts", {}, [], {}),
    ("same length", {}, [[3, 4], [5]], {}),
    ("wanted the token ids", {}, [[1.0]], {}),
    ("Token 97 is not in the vocabulary, 0 to 96", {"rnn": rnn}, [[97]], {}),
    (r"layers=\[-1\]: wanted at least one of 0 to 1", {}, TEXTS, {"layers": [-1]}),
    (r"layers=\[\]", {}, TEXTS, {"layers": []}),
    ("name of a control", {ITSELF: rnn}, TEXTS, {}),
    ("deep has 3 layers of 6 heads: wanted the teacher's 2 and 6", {"deep": deep}, TEXTS, {}),
    ("broken: the attention matrices of layer 0 are not finite on text 0", {"broken": broken}, TEXTS, {}),
  ):
    with pytest.raises(ValueError, match=message):
      compare(teacher, given, texts, **how)
  with pytest.raises(ValueError, match="Layer 0 of the teacher is 'supra': wanted softmax"):
    compare(rnn, {}, TEXTS)
  *_, memory = attention_matrices(LM(HYBRID, random_params(HYBRID)), TEXTS)
  with pytest.raises(ValueError, match="Layer 1 is 'memory': wanted a mixer of softmax, t2r"):
    memory.of(0)
