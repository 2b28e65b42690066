"""What a state remembers, on a model that is known to copy within N tokens and not beyond; and against plain loops."""

import functools
import json
import math

import numpy as np
import pytest

from supra_jax.data.planted import plant
from supra_jax.evaluation import ablation, by_distance, memory_loss, recall
from supra_jax.evaluation.intervals import interval, share_interval
from supra_jax.evaluation.readers import EQUAL, MODEL, OWN, TEACHER, described, reader, readers
from supra_jax.experiments import tiny
from supra_jax.inference.lm import LM
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Window
from supra_jax.model import presets
from supra_jax.model.registry import layers
from tests.evaluation import copying
from tests.model import toy_mixer  # noqa: F401  # registers itself
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")
WINDOW, LENGTH = 48, 220  # of a text, so that texts of all distances share their programs
# S of a layer has 64 * 48 float32, and a token's keys and values have 64 + 48 bfloat16: S is as large as 54.9 tokens.
EQUAL_WINDOW = 102


@functools.cache
def models():
  return readers(copying.student(WINDOW), copying.teacher(), 256)


@functools.cache
def texts(distance, count=8):
  how = {"count": count, "alphabet": copying.LETTERS, "before": LENGTH - distance, "facts": 4, "candidates": 16}
  return plant("repeat", distance, copying.filler(), **how)


def test_the_window_of_equal_bytes_is_of_equal_bytes():
  about = {name: described(made, 256) for name, made in models().items()}
  layer = 64 * 48 * 4 + WINDOW * (64 + 48) * 2
  assert about[MODEL]["state_bytes"] == 2 * layer and about[TEACHER]["state_bytes"] == 2 * 256 * (64 + 48) * 2
  assert about[EQUAL]["windows"] == [EQUAL_WINDOW] and about[OWN]["windows"] == [WINDOW]
  assert 2 * layer - 2 * 224 < about[EQUAL]["state_bytes"] <= 2 * layer
  assert about[MODEL]["reach"] == 2 * WINDOW and about[TEACHER]["reach"] is None


# Item 8: recall by distance.


def test_recall_steps_at_the_window():
  distances = (30, WINDOW, WINDOW + 1, EQUAL_WINDOW, EQUAL_WINDOW + 1, 204)
  rows = by_distance.by_distance(models(), {distance: texts(distance) for distance in distances}, batch_size=8)
  assert [row["distance"] for row in rows] == list(distances)
  for row in rows:
    right = {name: found["right"] for name, found in row["models"].items()}
    sees = {MODEL: WINDOW, OWN: WINDOW, EQUAL: EQUAL_WINDOW, TEACHER: 10**9}
    for name, window in sees.items():
      assert right[name] == 1 if row["distance"] <= window else right[name] <= 0.25, (row["distance"], name)
    assert not row["teacher_fails"] and row["models"][MODEL]["chance"] == 1 / 16
    reaches = {MODEL: 2 * WINDOW, OWN: 2 * WINDOW, EQUAL: 2 * EQUAL_WINDOW}
    assert set(row["beyond_reach"]) == {name for name, seen in reaches.items() if seen < row["distance"]}


def test_a_distance_at_which_the_teacher_fails_is_marked():
  own = models()[OWN]
  (row,) = by_distance.by_distance({MODEL: own, TEACHER: own}, {WINDOW + 1: texts(WINDOW + 1)}, batch_size=8)
  assert row["teacher_fails"]


def test_ranks_are_those_of_whole_texts(random_params):
  """Each candidate read with its text in one call; the likelihoods in float64 by a loop."""
  config = presets.tiny("supra_window")
  lm, made = LM(config, random_params(config)), plant("repeat", 30, range(97), count=5, before=20, facts=2)
  whole = [[*text.context, *answer] for text in made for answer in text.candidates]
  logits = iter(np.asarray(lm(np.array(whole))[0], np.float64))
  want = []
  for text in made:
    scores = []
    for answer in text.candidates:
      table = next(logits)[len(text.context) - 1 : -1]
      loss = [math.log(sum(map(math.exp, row))) - row[token] for row, token in zip(table, answer, strict=True)]
      scores.append(-sum(loss))
    want.append(sum(score > scores[text.right] for score in scores))
  assert len(set(want)) > 1
  np.testing.assert_array_equal(by_distance.ranks(reader(lm), made, batch_size=2), want)


# Item 6: loss where memory counts.


def test_losses_in_pieces_are_those_of_one_call(random_params):
  config = presets.tiny("supra_window")
  lm, rows = LM(config, random_params(config)), np.random.default_rng(0).integers(0, 97, (2, 600))
  logits = np.asarray(lm(rows[:, :-1])[0], np.float64)
  chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(reader(lm).losses(rows), np.log(np.exp(logits).sum(-1)) - chosen, atol=2e-4)


def repeats_by_a_loop(tokens, ngram):
  last, found = {}, []
  for end in range(len(tokens)):
    gram = tuple(tokens[end - ngram + 1 : end + 1]) if end >= ngram - 1 else None
    found.append(end - last[gram] if gram in last else 0)
    if gram is not None:
      last[gram] = end
  return found


@pytest.mark.parametrize("ngram", [2, 3, 5])
def test_repeats_against_a_loop(ngram):
  for seed, (size, kinds) in enumerate([(300, 4), (300, 20), (3, 2), (ngram, 1), (1, 1)]):
    tokens = np.random.default_rng(seed).integers(0, kinds, size)
    assert memory_loss.repeat_distances(tokens, ngram).tolist() == repeats_by_a_loop(tokens.tolist(), ngram)


def test_what_is_recovered_against_a_loop():
  rng = np.random.default_rng(0)
  shifts = {MODEL: np.float32(1), TEACHER: np.float32(0), EQUAL: np.float32(1.5)}
  losses = {name: rng.exponential(size=(7, 40)).astype(np.float32) + shift for name, shift in shifts.items()}
  chosen = rng.random((7, 40)) < 0.3
  got = memory_loss.compared(losses, EQUAL, chosen)
  sums, per_document = dict.fromkeys(losses, 0.0), []
  for document in range(7):
    own = dict.fromkeys(losses, 0.0)
    for token in range(40):
      if chosen[document, token]:
        for name in losses:
          own[name] += float(losses[name][document, token])
    per_document.append(own)
    sums = {name: sums[name] + own[name] for name in losses}
  assert got["tokens"] == chosen.sum()
  for name in losses:
    assert got["loss"][name] == pytest.approx(sums[name] / chosen.sum(), rel=1e-12)

  def recovered(sums):
    return (sums[EQUAL] - sums[MODEL]) / (sums[EQUAL] - sums[TEACHER])

  assert got["R"][MODEL]["value"] == pytest.approx(recovered(sums), rel=1e-12)
  drawn = []
  for _ in range(4000):
    sample = [per_document[i] for i in rng.integers(0, 7, 7)]
    drawn.append(recovered({name: sum(own[name] for own in sample) for name in losses}))
  drawn.sort()
  low, high = got["R"][MODEL]["interval"]
  width = drawn[3899] - drawn[99]
  assert abs(low - drawn[99]) < 0.1 * width and abs(high - drawn[3899]) < 0.1 * width


def test_the_interval_of_a_mean_is_that_of_a_normal_distribution():
  x = np.random.default_rng(1).standard_normal(200)
  low, high = interval(lambda sums: sums[..., 0] / 200, x[:, None])
  spread = 1.96 * x.std() / math.sqrt(200)
  assert low == pytest.approx(x.mean() - spread, abs=0.15 * spread)
  assert high == pytest.approx(x.mean() + spread, abs=0.15 * spread)
  assert interval(lambda sums: sums[..., 0], x[:1, None]) is None
  # Of a ratio whose denominator may be 0 or less, nothing is known.
  assert interval(lambda sums: np.where(sums[..., 0] > 0, sums[..., 0], np.nan), x[:, None]) is None


@pytest.mark.parametrize("right, count", [(0, 10), (3, 10), (16, 16), (40, 200)])
def test_the_interval_of_a_share(right, count):
  """At either end p the share that was found is 1.96 of p's own standard deviations away."""
  for end in share_interval(right, count):
    spread = math.sqrt(end * (1 - end) / count)
    assert abs(right / count - end) == pytest.approx(1.959964 * spread, abs=1e-9)


def test_no_advantage_is_no_number():
  same = np.ones((2, 3), np.float32)
  got = memory_loss.compared({MODEL: same, TEACHER: same, EQUAL: same}, EQUAL, np.ones((2, 3), bool))
  assert math.isnan(got["R"][MODEL]["value"]) and got["R"][MODEL]["interval"] is None
  nothing = memory_loss.compared({MODEL: same, TEACHER: same, EQUAL: same}, EQUAL, np.zeros((2, 3), bool))
  assert nothing["tokens"] == 0 and nothing["loss"][MODEL] is None and math.isnan(nothing["saved"][MODEL]["value"])


@pytest.mark.parametrize("distance", [30, WINDOW, WINDOW + 1, EQUAL_WINDOW + 1])
def test_loss_on_repeats_steps_at_the_window(distance):
  """A string of eight tokens comes again: its last five end four tokens that were there before.

  So does another one where the same filler is before both.
  """
  rows = np.stack([text.text for text in texts(distance)])
  losses = memory_loss.read_losses(models(), rows, batch_size=8)
  windows = {EQUAL: EQUAL_WINDOW, OWN: WINDOW}
  found = memory_loss.summary(rows, losses, windows, ngram=4)
  (repeats,) = found["by_repeat"]
  count = sum(back > 0 for row in rows for back in repeats_by_a_loop(row, 4))
  assert repeats["tokens"] == count >= 40 and repeats["from"] <= distance < repeats["to"]
  for name, window in {**windows, MODEL: WINDOW, TEACHER: 10**9}.items():
    loss = repeats["loss"][name]
    assert loss < 0.01 if distance <= window else loss > 2, name
  for name, window in windows.items():
    far = found["against"][name]["far_repeats"]
    assert far["tokens"] == (count if distance > window else 0)
    if not far["tokens"]:
      continue
    # The model is its own window, and the other window sees all or nothing.
    share = far["R"][OWN if name == EQUAL else EQUAL]["value"]
    assert abs(far["R"][MODEL]["value"]) < (1e-3 if name == OWN else 0.3)
    assert share > 0.99 if name == OWN and distance <= EQUAL_WINDOW else abs(share) < 0.3
    gains = found["against"][name]["teacher_gains"]
    assert gains["tokens"] >= 40 and gains["loss"][name] - gains["loss"][TEACHER] > 1
  positions = sum(line["tokens"] for line in found["by_position"])
  assert positions == rows[:, 1:].size == found["all"]["tokens"]


# Item 7: parts of a state.


def test_a_part_that_is_not_read_is_worth_nothing():
  rows = np.stack([text.text[:128] for text in texts(100, 4)])
  found = ablation.ablate(models()[MODEL], rows, batch_size=4)
  assert set(found) == {"linear", "window", ablation.ALL}
  for how in ("nothing", "another"):
    assert found["linear"][how]["added"] == 0 and found["linear"][how]["interval"] == (0, 0)
    assert found["window"][how]["added"] == found[ablation.ALL][how]["added"] != 0
  assert found["linear"]["bytes"] == 2 * 64 * 48 * 4 and found["window"]["bytes"] == 2 * WINDOW * 224
  assert sum(found[part]["share"] for part in ("linear", "window")) == found[ablation.ALL]["share"] == 1


def test_the_window_is_needed_for_what_is_in_it_and_for_no_longer():
  """The second halves repeat the first: the state's window is needed as long as it holds tokens from before the cut."""
  half = np.stack([np.random.default_rng(i).permutation(copying.LETTERS) for i in range(4)])
  rows = np.concatenate([half, half, half, half], axis=1)
  found = ablation.ablate(models()[MODEL], rows)["window"]["nothing"]["by_distance"]
  assert [(line["from"], line["to"]) for line in found] == [(0, 16), (16, 63)]
  own = reader(copying.student(WINDOW), "bfloat16")
  half_read = own.read(rows[:, :64], own.fresh(4, 128))[1]
  losses = own.losses(rows[:, 64:], ablation.with_part_of(half_read, own.fresh(4, 128), own.config, "window"))
  assert losses[:, :30].min() > 1 and losses[:, WINDOW:].max() < 0.01
  assert found[0]["added"] == pytest.approx(losses[:, :16].mean(), abs=0.01)


def test_parts_of_any_mixers(random_params):
  """The part is replaced, all else stays; a document's own state in its place changes nothing."""
  config = presets.tiny("softmax").replace(
    layers=layers(("softmax", "supra", "supra_window", "toy"), window=5, sinks=1)
  )
  own = reader(LM(config, random_params(config)))
  assert ablation.parts(config) == ("cache", "linear", "window", "mean")
  rows = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
  one, other = (own.read(rows[[i]], own.fresh(1, 32))[1] for i in range(2))
  mixed = ablation.with_part_of(one, other, config, "linear")
  for number, fields in enumerate((("k", "v"), ("s",), ("s", "k", "v"), ("mean",))):
    for field in fields:
      source = other if field == "s" else one
      assert getattr(mixed.layers[number], field) is getattr(source.layers[number], field)
  with pytest.raises(ValueError, match="wanted one of cache, linear, window, mean"):
    ablation.with_part_of(one, other, config, "memory")
  same = ablation.ablate(own, rows[[0, 0]])
  for part in ("cache", "linear", "window", "mean"):
    assert same[part]["another"]["added"] == 0 and same[part]["nothing"]["added"] != 0
  assert ablation.readings(own, rows) == 2 * (12 + 10 * 12)
  with pytest.raises(ValueError, match="wanted at least 2"):
    ablation.ablate(own, rows[:1])


# The report.


def test_the_program(tmp_path):
  """On a transformer with random weights and the same with windows: R is 0 beside its own window, and 0 is said."""
  tiny.write_checkpoint(tmp_path / "teacher", "softmax", layers=layers(("softmax",)))
  linearize_checkpoint(tmp_path / "teacher", tmp_path / "model", Window(window=16))
  flags = ["--max_documents=2", "--length=200", "--distances=150", "--kind=passkey", "--items=2"]
  told = [f"--{name}={tmp_path / path}" for name, path in (("checkpoint", "model"), ("teacher", "teacher"))]
  told.append(f"--output={tmp_path / 'found.json'}")
  ran = programs.run("supra_jax.bin.recall", *told, *flags)
  assert ran.returncode == 0, ran.stderr
  for words in ("| model |", EQUAL, "| linear |", "Recall of passkey", "beyond layers x window"):
    assert words in ran.stdout
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["loss"]["documents"] == 2 and found["loss"]["length"] == 200
  own = found["loss"]["against"][OWN]["far_repeats"]
  assert own["tokens"] > 20 and abs(own["saved"][MODEL]["value"]) < 1e-6
  assert found["parts"]["linear"]["another"]["added"] == 0 != found["parts"]["window"]["another"]["added"]
  assert [line["distance"] for line in found["recall"]["passkey"]] == [150]


def test_what_cannot_be_measured_is_said():
  lm, teacher = copying.student(WINDOW), copying.teacher()
  with pytest.raises(ValueError, match="wanted softmax alone"):
    recall.report(teacher, lm, [range(9)] * 2, length=8)
  with pytest.raises(ValueError, match="1 of 2 documents have 8 tokens"):
    recall.report(lm, teacher, [range(9), range(3)], length=8)
  other = presets.tiny("softmax")
  with pytest.raises(ValueError, match="wanted the model's own teacher"):
    recall.report(lm, LM(other, {"embed_tokens": {"embedding": np.zeros(1, np.float32)}}), [range(9)] * 2, length=8)
