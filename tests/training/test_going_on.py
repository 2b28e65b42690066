"""A run that goes on: with more steps than it had, and before the time that a scheduler grants is up."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import runs
from benchmarks.runs import losses, make_config
from supra_jax.core import preemption
from supra_jax.storage.model_directory import load_model
from supra_jax.training import loop as train
from supra_jax.training.metrics import read_metrics
from tests.training.test_train import _differing

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONSTANT = {"learning_rate": 1e-2, "end_learning_rate": 1e-2, "warmup_steps": 2}


@pytest.fixture(scope="module")
def short(start, text, tmp_path_factory) -> Path:
  """The workdir of a run of six steps, which is finished; to copy before anything is changed there."""
  workdir = tmp_path_factory.mktemp("short")
  train.train(make_config(start, text, num_steps=6, save_every=6, optimizer=CONSTANT), workdir)
  return workdir


def test_a_finished_run_goes_on_to_more_steps(short, start, text, tmp_path, capfd):
  workdir = shutil.copytree(short, tmp_path / "run")
  config = make_config(start, text, save_every=6, optimizer=CONSTANT)
  with pytest.raises(ValueError, match=r"another workdir.*init_checkpoint=.*checkpoint.*Or --extend goes on here"):
    train.train(config, workdir)
  summary = train.train(config, workdir, extend=True)
  assert (
    "Goes on after step 6 of 12. It had 6 steps; the learning rate, which was 0.01 there, is 0.01."
    in capfd.readouterr().err
  )
  # The rate is the same at all steps, so that this is the run that had twelve steps from the first on.
  whole = train.train(config, tmp_path / "whole")
  assert losses(workdir) == losses(tmp_path / "whole") and summary.nll_after == whole.nll_after
  assert not _differing(load_model(workdir / "checkpoint").params, load_model(tmp_path / "whole/checkpoint").params)
  assert json.loads((workdir / "checkpoint/source.json").read_text())["tokens_trained"] == 12 * 4 * 64
  # Once it is a run of twelve steps, it is one.
  assert train.train(config, workdir) == summary == train.train(config, workdir, extend=True)


def test_the_rate_is_that_of_the_longer_run(short, start, text, tmp_path, capfd):
  changes = {"save_every": 3, "optimizer": {"learning_rate": 1e-2, "end_learning_rate": 0.0, "warmup_steps": 0}}
  train.train(make_config(start, text, num_steps=6, **changes), tmp_path / "run")
  config = make_config(start, text, **changes)
  train.train(config, tmp_path / "run", extend=True)
  # Half a cosine of 6 steps has the rate 0.67e-3 at its last step; one of 12 steps has half of the peak behind six.
  assert "It had 6 steps; the learning rate, which was 0.00067 there, is 0.005." in capfd.readouterr().err
  rates = {r["step"]: r["learning_rate"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r}
  assert rates[6] == pytest.approx(0.67e-3, rel=0.01) and rates[7] == pytest.approx(5e-3)


def test_what_cannot_be_extended(short, start, text, tmp_path):
  config = make_config(start, text, save_every=6, optimizer=CONSTANT)
  with pytest.raises(ValueError, match=r"--extend: .*none has no run that could go on"):
    train.train(config, tmp_path / "none", extend=True)
  fewer = make_config(start, text, num_steps=5, save_every=6, optimizer=CONSTANT)
  with pytest.raises(ValueError, match=r"--extend: .*belongs to a run of 6 steps: wanted --config.num_steps above"):
    train.train(fewer, shutil.copytree(short, tmp_path / "fewer"), extend=True)
  workdir = shutil.copytree(short, tmp_path / "other")
  with pytest.raises(ValueError, match=r"another config or model.*batch_size: 4 before, 2 now"):
    train.train(make_config(start, text, save_every=6, optimizer=CONSTANT, batch_size=2), workdir, extend=True)
  with pytest.raises(ValueError, match="batch_size") as refused:
    other = make_config(start, text, num_steps=6, save_every=6, optimizer=CONSTANT, batch_size=2)
    train.train(other, workdir, extend=True)
  assert "--extend goes on here" not in str(refused.value) and not (tmp_path / "none").exists()
  shutil.rmtree(workdir / "training")
  stored = (workdir / "train_config.json").read_bytes()
  with pytest.raises(ValueError, match=r"has no saved state to go on from.*--config.init_checkpoint=.*checkpoint"):
    train.train(config, workdir, extend=True)
  assert (workdir / "train_config.json").read_bytes() == stored


def test_it_saves_before_the_time_is_up(start, text, tmp_path):
  config = make_config(start, text, num_steps=100_000)
  began = time.monotonic()
  with pytest.raises(preemption.Preempted, match=r"the time is up: saved after step \d+ of 100000") as ended:
    train.train(config, tmp_path / "run", save_before=began + preemption.SAVING_SECONDS + 6)
  assert time.monotonic() - began < preemption.SAVING_SECONDS and ended.value.by == preemption.TIME_IS_UP
  (stopped,) = re.findall(r"after step (\d+)", str(ended.value))
  assert max(runs.positions(tmp_path / "run")) == max(losses(tmp_path / "run")) == int(stopped)


def test_two_processes_save_before_the_time_is_up(start, text, tmp_path):
  """They stop after the same step, and end as a run does that a scheduler is to start again."""
  config = make_config(start, text, num_steps=100_000, mesh="data:2")
  run = runs.Run(config, tmp_path / "run", f"--save_before={int(preemption.SAVING_SECONDS) + 15}", processes=2)
  assert 75 in run.wait(100)
  steps = re.findall(r"the time is up: saved after step (\d+)|SIGTERM: saved after step (\d+)", run.said)
  assert len(steps) == 2 and len({"".join(found) for found in steps}) == 1, run.said
  assert max(runs.positions(tmp_path / "run")) == int("".join(steps[0]))


def test_steps_that_take_long_end_a_job_earlier(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
  with preemption.preemption(before=preemption.SAVING_SECONDS + 100) as preempted:
    said = []
    for seconds in (90, 1, 1, 3, 1):  # the first step compiles
      now[0] += seconds
      said.append(preempted(len(said) + 1))
  assert said == ["", "", "", "the time is up", "the time is up"]  # 95 seconds, and 2 x 3 for what comes


SBATCH = Path(__file__).parents[2] / "configs/slurm.sbatch"
# What the file calls of Slurm: programs that run what they are given, and say what they were asked for.
SRUN = '#!/bin/bash\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> "$(dirname "$0")/asked"\n'


@pytest.mark.parametrize("time_is_up", [True, False])
def test_a_job_of_slurm_asks_to_be_started_again_until_it_is_done(time_is_up, start, text, tmp_path):
  binaries = tmp_path / "bin"
  binaries.mkdir()
  programs = {"srun": SRUN, "scontrol": SCONTROL, "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n'}
  for name, contents in programs.items():
    (binaries / name).write_text(contents)
    (binaries / name).chmod(0o755)
  config = make_config(start, text, num_steps=100_000 if time_is_up else 3)
  recipe = runs.write_recipe(config, tmp_path / "recipe.py")
  script = SBATCH.read_text().replace(" --distributed", "")  # there is one process
  (tmp_path / "job.sbatch").write_text(script)
  granted = str(int(preemption.SAVING_SECONDS) + 10)
  told = {"CONFIG": str(recipe), "WORKDIR": str(tmp_path / "run"), "SECONDS_GRANTED": granted, "SLURM_JOB_ID": "17"}
  environment = os.environ | told | {"PATH": f"{binaries}:{os.environ['PATH']}"}
  ran = subprocess.run(
    ["bash", tmp_path / "job.sbatch"],
    cwd=SBATCH.parents[1],
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ran.returncode == 0, ran.stderr
  assert (tmp_path / "run/checkpoint").exists() != time_is_up
  asked = binaries / "asked"
  assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if time_is_up else "")
