"""The loss of a text in windows, against a loop over its tokens in float64 and against transformers."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supra_jax
from supra_jax.evaluation import perplexity
from supra_jax.evaluation.perplexity import cut, evaluate_text, text_loss
from supra_jax.experiments import tiny
from supra_jax.model.registry import layers
from supra_jax.objectives.heldout import loss_sums, token_nll
from tests.convert_weights.tiny_checkpoints import GOLDEN, read
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, BOS = 16, 0
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, 3 * LENGTH + 5).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A cache, a ring and linear states, with a tokenizer that puts a token before texts."""
  config = {"layers": layers(("softmax", "supra_window"), window=5, sinks=2)}
  made = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", **config)
  (made / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": tiny.END}))
  return made


@pytest.fixture(scope="module")
def lm(directory):
  return supra_jax.load(directory)


def one_by_one(lm, ids, length, stride, lead=()):
  """{index of a token: (loss, tokens read before it)}: each in the first window that holds it, alone in float64."""
  logits = {}
  found = {}
  for t in range(len(ids)):
    begin = max(0, -(-(t + 1 - length) // stride)) * stride
    if begin not in logits:
      window = [*lead, *ids[begin : begin + length]]
      padded = np.zeros((1, len(lead) + length), np.int32)
      padded[0, : len(window)] = window
      logits[begin] = np.asarray(lm(padded)[0][0], np.float64)
    at = len(lead) + t - begin
    if at:
      row = logits[begin][at - 1]
      found[t] = (math.log(sum(math.exp(x - row.max()) for x in row)) + row.max() - row[ids[t]], at)
  return found


@pytest.mark.parametrize("stride, bos", [(4, "never"), (15, "text"), (16, "text"), (6, "windows")])
def test_each_token_in_the_first_window_that_holds_it(lm, stride, bos):
  got = text_loss(lm, TOKENS, sequence_length=LENGTH, stride=stride, bos=bos)
  if bos == "windows":
    want = one_by_one(lm, TOKENS, LENGTH - 1, stride, [BOS])
    assert len(want) == len(TOKENS)  # all are scored
  else:
    ids = [BOS, *TOKENS] if bos == "text" else TOKENS
    whole = len(ids) // LENGTH * LENGTH if stride == LENGTH else len(ids)
    want = one_by_one(lm, ids[:whole], LENGTH, stride)
  losses, positions = zip(*(want[t] for t in sorted(want)), strict=True)
  np.testing.assert_allclose(got.nll, losses, atol=2e-5)
  np.testing.assert_array_equal(got.position, positions)
  assert got.mean == pytest.approx(np.mean(losses), abs=1e-5) and got.targets == len(losses)


def test_without_a_stride_the_numbers_are_those_of_whole_pieces(lm):
  pieces = np.reshape(TOKENS[: 3 * LENGTH], (3, LENGTH)).astype(np.int32)
  sums = loss_sums(lm.model, lm.params, {"tokens": pieces})
  got = text_loss(lm, TOKENS, sequence_length=LENGTH)
  assert got.targets == float(sums.weight) == 45 and got.mean == pytest.approx(float(sums.nll) / 45, abs=1e-6)
  assert [window["begin"] for window in got.by_window()] == [0, 16, 32] and got.stride == LENGTH


def test_batches_change_rounding_only(lm):
  one, *others = (text_loss(lm, TOKENS, sequence_length=LENGTH, stride=5, batch_size=n) for n in (1, 3, 99))
  for other in others:
    np.testing.assert_allclose(other.nll, one.nll, atol=1e-5)
    np.testing.assert_array_equal(other.window, one.window)


@pytest.mark.parametrize("bos", ["never", "text"])
def test_a_text_read_once_is_one_window(lm, bos, monkeypatch):
  monkeypatch.setattr(perplexity, "PIECE_TOKENS", 12)
  once = text_loss(lm, TOKENS, sequence_length=0, bos=bos)
  wide = len(TOKENS) + (bos == "text")
  want = text_loss(lm, TOKENS, sequence_length=wide, bos=bos)
  np.testing.assert_allclose(once.nll, want.nll, atol=1e-4)
  np.testing.assert_array_equal(once.position, np.arange(1, wide))
  assert once.how.startswith("the whole text read once, ") and once.begins.tolist() == [0]


def test_every_token_is_scored_once_with_enough_context():
  for count, length, first in itertools.product((2, 7, 16, 17, 40), (2, 5, 16), (0, 1)):
    for stride in range(1, length + 1):
      windows = cut(count, length, stride, first=first)
      scored = [t for _, begin, end in windows for t in range(begin, end)]
      assert len(set(scored)) == len(scored)
      if stride < length:
        assert scored == list(range(first, count))
        assert all(scored_first - begin >= length - stride for begin, scored_first, _ in windows[1:])
      else:
        assert len(windows) == count // length and len(scored) == len(windows) * (length - first)


@pytest.mark.parametrize("stride", [4, 16])
def test_transformers_agree(stride):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  directory = GOLDEN / "llama_gqa_tied"
  theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
  ids = np.random.default_rng(1).integers(0, 97, 3 * LENGTH).tolist()
  # The recipe of transformers' guide to perplexity.
  losses, end_before = [], 0
  for begin in range(0, len(ids), stride):
    end = min(begin + LENGTH, len(ids))
    window = torch.tensor([ids[begin:end]])
    labels = window.clone()
    labels[:, : -(end - end_before)] = -100
    with torch.no_grad():
      losses.append(theirs(window, labels=labels).loss.item())
    end_before = end
    if end == len(ids):
      break
  got = text_loss(read(directory), ids, sequence_length=LENGTH, stride=stride)
  np.testing.assert_allclose([window["loss"] for window in got.by_window()], losses, atol=1e-5)


def test_spans_and_windows_add_up(lm):
  got = text_loss(lm, TOKENS, sequence_length=LENGTH, stride=5)
  for rows in (got.by_position(), got.by_position(1), got.by_window()):
    assert sum(row["targets"] for row in rows) == got.targets
    assert sum(row["loss"] * row["targets"] for row in rows) / got.targets == pytest.approx(got.mean)
  spans = [(row["first"], row["last"]) for row in got.by_position(1)]
  assert spans == [(1, 1), (2, 3), (4, 7), (8, 15)]
  assert got.by_position(1)[-1]["loss"] == pytest.approx(got.nll[got.position >= 8].mean())
  assert got.by_window()[1] == {"begin": 5, "loss": pytest.approx(got.nll[15:20].mean()), "targets": 5}


def test_logits_of_a_long_text_are_never_held():
  config = tiny.tiny_config("supra").replace(vocab_size=8192)
  from supra_jax.model.shapes import parameter_shapes
  from supra_jax.model.transformer import Transformer

  model, tokens = Transformer(config), 8192
  shape = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
  compiled = token_nll.lower(model, parameter_shapes(model), shape).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < tokens * config.vocab_size * 4 / 4


def test_begin_of_text_is_where_the_tokenizer_puts_it(directory, lm, text):
  assert lm.tokenizer.begins_texts and lm.tokenizer.bos_id == BOS
  how = {"sequence_length": LENGTH, "max_tokens": 60}
  default, never = evaluate_text(lm, str(text), **how), evaluate_text(lm, str(text), bos="never", **how)
  assert default.bos == "text" and "a begin-of-text token before the text" in str(default)
  ids = list(itertools.islice(itertools.chain(*(lm.tokenizer.encode(d, bos=False) for d in _documents(text))), 60))
  assert default.mean == text_loss(lm, [BOS, *ids], sequence_length=LENGTH).mean != never.mean
  assert never.mean == text_loss(lm, ids, sequence_length=LENGTH).mean
  assert text_loss(lm, [BOS, *ids], sequence_length=LENGTH, bos="text").mean == default.mean  # not twice
  (directory / "tokenizer_config.json").rename(directory / "aside")
  try:
    assert evaluate_text(supra_jax.load(directory), str(text), **how).bos == "never"
  finally:
    (directory / "aside").rename(directory / "tokenizer_config.json")


def _documents(path):
  return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_arguments_out_of_range_are_named(lm):
  for how, message in [
    ({"sequence_length": 1}, "sequence_length=1: wanted at least 2"),
    ({"sequence_length": 16, "stride": 17}, "stride=17: wanted 1 to 16"),
    ({"sequence_length": 16, "stride": 16, "bos": "windows"}, "stride=16: wanted 1 to 15"),
    ({"sequence_length": 0, "stride": 4}, "stride=4: wanted None"),
    ({"sequence_length": 16, "bos": "always"}, "bos='always': wanted one of text, windows, never"),
    ({"sequence_length": 16, "batch_size": -1}, "batch_size=-1"),
    ({"sequence_length": 100}, "The text has 53 tokens, fewer than one piece of 100"),
  ]:
    with pytest.raises(ValueError, match=message):
      text_loss(lm, TOKENS, **how)
  with pytest.raises(ValueError, match="has 1 tokens, fewer"):
    text_loss(lm, [5], sequence_length=0)
  bare = supra_jax.LM(lm.config, lm.params)
  with pytest.raises(ValueError, match="no token that begins a text"):
    text_loss(bare, TOKENS, sequence_length=16, bos="text")


def test_the_program_prints_and_writes(directory, text, tmp_path):
  output = tmp_path / "new" / "loss.json"
  how = [f"--checkpoint={directory}", f"--input={text}", "--sequence_length=16", "--max_tokens=100", "--bos=never"]
  ran = programs.run("supra_jax.bin.evaluate", *how, "--stride=8", f"--output={output}")
  assert ran.returncode == 0, ran.stderr
  helped = programs.run("supra_jax.bin.evaluate", "--help").stdout
  assert all(f"--{name}:" in helped for name in ("checkpoint", "stride", "bos", "implementation", "output")), helped
  said = json.loads(output.read_text())
  assert said["targets"] == 99 and said["stride"] == 8 and said["bos"] == "never" and len(said["by_window"]) == 12
  assert ran.stdout.startswith(
    f"loss {said['loss']:.4f} nats a token, perplexity {said['perplexity']:.3f}, 99 tokens, pieces of 16, one every 8 "
    "tokens, no begin-of-text token\n"
  )
  assert "  8-15 " in ran.stdout and "99/99 tokens, loss " in ran.stderr
