"""Figure 1 of tiny models: the bytes and seconds of its centre, and the picture."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.evaluation import paper
from supra_jax.experiments import decoding_cost, tiny
from supra_jax.experiments.figure_1 import LENGTHS, accuracies, figure_1, measure, plot, table
from supra_jax.model.registry import layer
from supra_jax.storage.model_directory import fingerprint

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOW = {"steps": 4, "repeats": 2}
AT = (16, 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  made = tmp_path_factory.mktemp("models")
  memory = layer("memory", window=4, retained=(6,), chunk=4)
  return {
    "softmax": tiny.write_checkpoint(made / "softmax", "softmax"),
    "supra": tiny.write_checkpoint(made / "supra", "supra"),
    "memory": tiny.write_checkpoint(made / "memory", memory, max_positions=32),
  }


@pytest.fixture(scope="module")
def rows(models):
  return measure(models, AT, **HOW)


def test_the_cache_grows_and_the_states_of_rnns_do_not(models, rows):
  found = {(row["model"], row["tokens"]): row for row in rows}
  assert list(found) == [(model, tokens) for model in models for tokens in AT]
  for name, directory in models.items():
    lm = supra_jax.load(directory)
    for tokens in AT:
      row, state = found[name, tokens], lm.model.init_state(1, tokens)
      assert row["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))
      assert row["fingerprint"] == fingerprint(directory) and row["grows"] == (name == "softmax")
      assert row["seconds"] == np.median(row["all_seconds"]) > 0 and len(row["all_seconds"]) == 2
    config, counters = lm.config, 12
    small, large = (found[name, tokens]["state_bytes"] - counters for tokens in AT)
    assert (large == 4 * small) if name == "softmax" else (large == small)
    if name == "softmax":
      assert small == 2 * config.num_layers * config.num_kv_heads * config.head_dim * AT[0] * 4
  halves = measure({"softmax": models["softmax"]}, AT[:1], state_dtype="bfloat16", **HOW)
  assert 2 * (halves[0]["state_bytes"] - 12) == found["softmax", 16]["state_bytes"] - 12
  assert halves[0]["dtypes"] == ["bfloat16", "int32"]


def test_states_are_filled_with_what_they_may_hold(models):
  lm = supra_jax.load(models["softmax"])
  shapes = jax.eval_shape(lambda: lm.model.init_state(1, 16))
  state = decoding_cost._filled(shapes, 12)
  assert {leaf.shape for leaf in jax.tree.leaves(state.layers)} == {(1, 16, *state.layers[0].k.shape[2:])}
  assert np.std(state.layers[0].k) == pytest.approx(1, rel=0.2)
  memory = supra_jax.load(models["memory"]).model
  held = decoding_cost._filled(jax.eval_shape(lambda: memory.init_state(1, 16)), 12).layers[0]
  assert held.kept_index.min() >= 0 and held.kept_index.max() < 12


def test_a_call_that_was_killed_goes_on(models, rows, tmp_path, monkeypatch):
  output = tmp_path / "figure.json"
  timed, seen = decoding_cost._timed, []

  def killed(*given):
    seen.append(given[5] + HOW["steps"])
    if len(seen) == 3:
      raise KeyboardInterrupt
    return timed(*given)

  monkeypatch.setattr(decoding_cost, "_timed", killed)
  with pytest.raises(KeyboardInterrupt):
    measure(models, AT, output=output, **HOW)
  first = json.loads(output.read_text())["rows"]
  assert [(row["model"], row["tokens"]) for row in first] == [("softmax", 16), ("softmax", 64)]
  whole = measure(models, AT, output=output, **HOW)
  assert whole[:2] == first and seen == [16, 64, 16, 16, 64, 16, 64]
  kept = json.loads(output.read_text())
  assert kept["rows"] == whole and len(kept["made_by"]) == 2 and kept["made_by"][0]["command"]
  assert [row["state_bytes"] for row in whole] == [row["state_bytes"] for row in rows]
  assert measure({"supra": models["supra"]}, AT[:1], output=output, **HOW) == whole[2:3] and len(seen) == 7
  assert json.loads(output.read_text()) == kept
  with pytest.raises(ValueError, match=r"holds results for .*: take another --output"):
    measure(models, AT, output=output, steps=5)
  output.write_text("[]")
  with pytest.raises(ValueError, match="holds something else"):
    measure(models, AT, output=output, **HOW)


def test_a_length_that_does_not_fit_is_named_and_tried_again(models, tmp_path, monkeypatch):
  output, softmax = tmp_path / "figure.json", {"softmax": models["softmax"]}
  monkeypatch.setattr(decoding_cost, "_bytes_taken", lambda program, state: state.capacity * 1000)
  monkeypatch.setattr(decoding_cost, "_free_bytes", lambda: 32_000)
  found = measure(softmax, AT, output=output, **HOW)
  assert "seconds" in found[0] and found[1]["skipped"] == "wants 7.04e-05 GB of memory, and 3.2e-05 GB are free"
  assert f"| 64 | {found[1]['skipped']} |  |" in table(found)
  monkeypatch.undo()
  assert measure(softmax, AT, output=output, **HOW)[0] == found[0]
  assert "skipped" not in output.read_text()


def test_arguments(models, tmp_path):
  assert LENGTHS[0] == 128 and LENGTHS[-1] == 131072 and len(LENGTHS) == 11
  with pytest.raises(ValueError, match=r"lengths=\[4\], steps=4, repeats=5: wanted a model, lengths above the steps"):
    measure(models, [4], steps=4)
  with pytest.raises(FileNotFoundError, match="is not a supra_jax model"):
    measure({"none": tmp_path}, AT)


def test_the_sides_are_columns_of_table_1(tmp_path):
  points = accuracies("HellaSwag")
  assert len(points) == len(paper.TABLE_1) and len(accuracies("MMLU")) == len(paper.TABLE_1) - 1
  assert {(p.name, p.tokens, p.percent, p.kind) for p in points} >= {
    ("Mistral 7B", 8000.0, 81.0, "transformer"),
    ("Mistral-SUPRA 7B", 20.0, 74.8, "supra"),
    ("RWKV-5-1.7T 7B", 1700.0, 73.0, "rnn"),
  }
  percent = dict(zip(paper.COLUMNS, (60.0, 70.0, 50.0, 40.0, 30.0, None), strict=True))
  file = tmp_path / "table_1.json"
  models = {name: {"results": {"percent": percent}} for name in ("Llama2 7B", "mine")}
  file.write_text(json.dumps({"models": models}))
  assert [(p.name, p.tokens) for p in accuracies("HellaSwag", file) if p.kind == "here"] == [
    ("Llama2 7B", 2000.0),
    ("mine", None),
  ]
  assert all(p.kind != "here" for p in accuracies("MMLU", file))
  plot([], tmp_path / "sides.png", table_1=file, columns=("ARC-E", "Average"))
  assert (tmp_path / "sides.png").stat().st_size > 20_000
  with pytest.raises(ValueError, match="column='ARC': wanted one of HellaSwag"):
    accuracies("ARC")
  file.write_text("{}")
  with pytest.raises(ValueError, match="wanted the JSON of table 1"):
    figure_1({"none": tmp_path}, tmp_path / "x.json", table_1=file)


def test_the_figure(models, tmp_path):
  text = figure_1(models, tmp_path / "figure.json", lengths=AT, **HOW)
  assert text.splitlines()[0].startswith("| tokens read | softmax, bytes | softmax, ms a token | supra, bytes |")
  assert text.splitlines()[2].startswith("| 16 | ") and len(text.splitlines()) == 4
  assert (tmp_path / "figure.png").stat().st_size > 40_000
  with pytest.raises(ValueError, match="is written beside it"):
    figure_1(models, tmp_path / "figure.png")
