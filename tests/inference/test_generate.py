"""Generation: what a loop over the whole text gives, from a state that does not grow."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.experiments import tiny
from supra_jax.inference import decode as generate
from supra_jax.inference.engine import generate_tokens
from supra_jax.inference.lm import LM
from supra_jax.inference.sampling import Sampling
from supra_jax.model.registry import layers
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "supra", "supra")


@pytest.fixture(scope="module")
def models(directory, random_params):
  mixers = layers(("softmax", "supra_window", "supra"), feature_map="per_head", window=5, sinks=2)
  configs = {
    "softmax": tiny.tiny_config("softmax"),
    "hybrid": tiny.tiny_config("supra").replace(layers=mixers, sliding_window=50, max_positions=16),
  }
  made = {name: LM(config, random_params(config)) for name, config in configs.items()}
  return {"supra": supra_jax.load(directory)} | made


@pytest.mark.parametrize("kind", ["supra", "softmax", "hybrid"])
def test_greedy_is_the_argmax_of_the_whole_text(models, kind, monkeypatch):
  lm = models[kind]
  monkeypatch.setattr(generate, "PREFILL_TOKENS", 256)  # so that the long prompt takes three pieces
  lengths = np.array([1, 7, 530]) + 21
  rows = np.zeros((3, 551), np.int32)
  for row, length in zip(rows, lengths, strict=True):
    prompt = np.random.default_rng(0).integers(1, tiny.VOCAB, length - 21).tolist()
    new = list(generate_tokens(lm.model, lm.params, prompt, max_new_tokens=21))
    assert len(new) == 21
    row[:length] = prompt + new
  # One parallel pass over prompts and answers says the same, token for token.
  logits, _ = lm(rows, lengths=lengths)
  for row, row_logits, length in zip(rows, np.asarray(logits), lengths, strict=True):
    assert row_logits[length - 22 : length - 1].argmax(-1).tolist() == row[length - 21 : length].tolist()


@pytest.mark.compat
def test_how_the_loop_is_cut_does_not_change_the_draws(models, monkeypatch):
  lm = models["supra"]
  draw = lambda: list(  # noqa: E731
    generate_tokens(lm.model, lm.params, [5, 6], max_new_tokens=19, sampling=Sampling(1.0, 50, 0.9, seed=3))
  )
  whole = draw()
  monkeypatch.setattr(generate, "DECODE_TOKENS", 3)
  assert draw() == whole and len(set(whole)) > 3


def test_stop_tokens_end_the_text(models):
  lm = models["supra"]
  free = list(generate_tokens(lm.model, lm.params, [5, 6], max_new_tokens=30))
  stop = free[10]
  stopped = list(generate_tokens(lm.model, lm.params, [5, 6], max_new_tokens=30, stop_ids=[stop]))
  assert stopped == free[: free.index(stop)]
  assert list(generate_tokens(lm.model, lm.params, [5], max_new_tokens=0)) == []
  with pytest.raises(ValueError, match="prompt is empty"):
    next(generate_tokens(lm.model, lm.params, [], max_new_tokens=1))


def test_lengths_are_rounded_up_by_a_quarter_at_most():
  for n in range(1, 5000):
    rounded = generate.round_up_length(n)
    assert n <= rounded <= max(n * 1.25, n)
  assert len({generate.round_up_length(n) for n in range(1, 100_000)}) < 70


def held_bytes() -> int:
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


def test_memory_does_not_grow_with_the_text(models):
  lm = models["supra"]
  tokens = generate_tokens(lm.model, lm.params, [5], max_new_tokens=100_000)
  for _ in range(20):
    next(tokens)
  early = held_bytes()
  for _ in range(1980):
    next(tokens)
  assert held_bytes() == early
  tokens.close()


@pytest.mark.slow
def test_memory_after_100k_tokens(models):
  import psutil

  lm, process = models["supra"], psutil.Process()
  tokens = generate_tokens(lm.model, lm.params, [5], max_new_tokens=100_000)
  for _ in range(1000):
    next(tokens)
  early, early_resident = held_bytes(), process.memory_info().rss
  for _ in range(98_000):
    next(tokens)
  assert held_bytes() == early
  assert process.memory_info().rss - early_resident < 32 * 2**20


@pytest.mark.compat
def test_text_streams_from_the_binary(models, directory, tmp_path):
  command = [sys.executable, "-m", "supra_jax.bin.generate", f"--checkpoint={directory}", "--prompt=The name"]
  root = Path(__file__).parents[2]
  result = subprocess.run(
    [*command, "--max_new_tokens=12", "--temperature=0"], cwd=root, capture_output=True, text=True, check=True
  )
  assert result.stdout == "The name" + models["supra"].generate("The name", max_new_tokens=12) + "\n"
  missing = programs.run("supra_jax.bin.generate", f"--checkpoint={tmp_path}/no", "--prompt=The name")
  assert missing.returncode == 1
  assert "is not a supra_jax model" in missing.stderr and "Traceback" not in missing.stderr
