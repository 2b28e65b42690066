"""Uptraining end to end, with real processes: it learns, goes on where it was killed, refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import supra_jax
from supra_jax import data, evaluate, train
from supra_jax.checkpoint import load_model, save_model
from supra_jax.metrics import read_metrics
from supra_jax.optimizer import OptimizerConfig
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
  return tiny.write_checkpoint(tmp_path_factory.mktemp("start") / "model", "supra")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
  return tiny.write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")


def make_config(start: Path, text: Path, **changes) -> train.TrainConfig:
  values = {
    "init_checkpoint": str(start),
    "data": train.DataConfig(str(text), sequence_length=64, heldout_every=6, heldout_rows=8),
    "optimizer": OptimizerConfig(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=3),
    "batch_size": 4,
    "num_steps": 12,
    "log_every": 1,
    "save_every": 0,
  } | changes
  return train.TrainConfig(**values)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"dtype": "bfloat16", "remat": "none"},
    {"data": {"documents": "separate"}},
  ],
  ids=["float32", "bfloat16", "separate"],
)
def test_learns_and_leaves_all_it_promises(start, text, tmp_path, changes):
  config = make_config(start, text)
  if "data" in changes:
    changes = {"data": dataclasses.replace(config.data, **changes["data"])}
  config = dataclasses.replace(config, **changes)
  summary = train.train(config, tmp_path, teacher_nll=3.0)

  assert summary.nll_after < summary.nll_before - 0.5
  assert summary.tokens_trained == 12 * 4 * 64
  records = read_metrics(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
  assert records[0]["heldout_nll"] == summary.nll_before and records[-1]["heldout_nll"] == summary.nll_after
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

  lm = supra_jax.load(tmp_path / "checkpoint")
  # The exported model is the trained one: it has the held-out loss that the run ended with.
  loader = data.make_loader(tmp_path / "data/heldout", batch_size=1, seed=0, shuffle=False, num_epochs=1)
  rows = [batch for batch, _ in zip(loader, range(8), strict=False)]
  nll = evaluate.mean_nll(lm.model, lm.params, rows)
  assert nll == pytest.approx(summary.nll_after, abs=0.02 if config.dtype == "bfloat16" else 1e-5)
  assert lm.generate("The ", max_new_tokens=4)


def run_train(config: train.TrainConfig, workdir: Path, recipe: Path, *flags: str) -> subprocess.Popen:
  values = json.dumps(dataclasses.asdict(config))
  recipe.write_text(
    "import json\nimport ml_collections\n\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict(json.loads({values!r}))\n"
  )
  command = [sys.executable, "-m", "supra_jax.bin.train", f"--config={recipe}", f"--workdir={workdir}", *flags]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(workdir: Path) -> dict[int, float]:
  return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


def test_a_killed_run_goes_on_bit_for_bit(start, text, tmp_path):
  config = make_config(start, text, num_steps=300, save_every=50)
  train.train(config, tmp_path / "whole")

  workdir = tmp_path / "killed"
  process = run_train(config, workdir, tmp_path / "recipe.py")
  deadline = time.monotonic() + 120
  while not (workdir / "training" / "50").exists():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert max(losses(workdir)) < 300, "the run was over before it could be killed"
  assert not (workdir / "checkpoint").exists()

  process = run_train(config, workdir, tmp_path / "recipe.py")
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "Held-out loss" in out
  assert losses(workdir) == losses(tmp_path / "whole")
  whole, killed = (supra_jax.load(d / "checkpoint").params for d in (tmp_path / "whole", workdir))
  np.testing.assert_array_equal(
    whole["layers_1"]["self_attn"]["feature_map"]["kernel"], killed["layers_1"]["self_attn"]["feature_map"]["kernel"]
  )


def test_overrides_and_errors_of_the_binary(start, text, tmp_path):
  config = make_config(start, text, num_steps=2)
  recipe = tmp_path / "recipe.py"

  process = run_train(config, tmp_path / "a", recipe, "--config.optimizer.learning_rate=0.25")
  assert process.wait(300) == 0, process.stderr.read()
  claimed = json.loads((tmp_path / "a" / train.CONFIG_FILE).read_text())
  assert claimed["optimizer"]["learning_rate"] == 0.25

  cases = {
    "--config.optimizer.learnin_rate=1": "learnin_rate",  # no such key
    "--config.batch_size=many": "batch_size",  # wrong type
    "--config.init_checkpoint=" + str(tmp_path / "nowhere"): "nowhere",
    "--config.data.input=" + str(tmp_path / "no*.txt"): "no*.txt",
    "--config.num_steps=0": "num_steps",
    "--config.data.heldout_every=100": "heldout part",  # of 24 documents
  }
  for flag, named in cases.items():
    process = run_train(config, tmp_path / "b", recipe, flag)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and named in err, (flag, err)
    assert process.returncode == 1 and "Traceback" not in err, (flag, err)


def test_another_config_in_the_same_workdir_is_refused(start, text, tmp_path):
  train.train(make_config(start, text, num_steps=1), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 before, 0.5 now"):
    train.train(make_config(start, text, num_steps=1, optimizer=OptimizerConfig(learning_rate=0.5)), tmp_path)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  # What only says how often to look may change.
  train.train(make_config(start, text, num_steps=1, log_every=5), tmp_path)


def test_a_checkpoint_without_tokenizer_is_refused(start, text, tmp_path):
  bare = tmp_path / "bare"
  model = load_model(start)
  save_model(bare, config=model.config, params=model.params, tokenizer_files={}, source={})
  with pytest.raises(ValueError, match="has no tokenizer"):
    train.train(make_config(bare, text), tmp_path / "run")
