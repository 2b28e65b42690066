"""What goes wrong in long runs: kills, signals, damaged files, a full disk, NaN; `benchmarks/faults.py` at length."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks import runs
from benchmarks.runs import losses, make_config
from supra_jax.data import loading
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 4
# Bytes that any file may have while the disk is "full": no training state fits, metrics do.
SMALL = 100_000


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
  # Wide, so that one array alone has more than SMALL bytes: Orbax spreads arrays over files as time has it.
  return tiny.write_checkpoint(tmp_path_factory.mktemp("start") / "model", "supra", hidden_size=96)


@pytest.fixture(scope="module", params=[120, pytest.param(300, marks=pytest.mark.slow)])
def config(start, text, request):
  """Of a run that saves its state six times."""
  steps = request.param
  return make_config(start, text, num_steps=steps, batch_size=BATCH, save_every=steps // 6, keep_checkpoints=3)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train(config, workdir)
  return workdir


@pytest.fixture
def copy(whole, tmp_path) -> Path:
  return shutil.copytree(whole, tmp_path / "run")


def states(workdir: Path) -> list[str]:
  return sorted((path.name for path in (workdir / "training").iterdir()), key=lambda name: (len(name), name))


def last_states(config) -> list[str]:
  return [str(config.num_steps - n * config.save_every) for n in (2, 1, 0)]


def assert_same_run(workdir: Path, whole: Path) -> None:
  assert losses(workdir) == losses(whole)
  got, want = (load_model(path / "checkpoint").params for path in (workdir, whole))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert runs.positions(workdir) == {step: step * BATCH for step in runs.positions(workdir)}


def test_killed_and_terminated_it_goes_on_bit_for_bit(config, whole, tmp_path):
  workdir = tmp_path / "run"
  run = runs.Run(config, workdir)
  run.until((workdir / "training" / str(config.save_every)).exists)
  run.send(signal.SIGKILL)
  assert run.wait() == [-signal.SIGKILL]
  assert max(losses(workdir)) < config.num_steps and not (workdir / "checkpoint").exists()

  last = max(losses(workdir))
  run = runs.Run(config, workdir)
  run.until(lambda: max(losses(workdir)) > last + 10)
  run.send(signal.SIGTERM)
  run.until(lambda: "SIGTERM: saved" in run.said, 25)  # clusters give 30 seconds
  said = run.finish()
  (stopped,) = re.findall(rf"SIGTERM: saved after step (\d+) of {config.num_steps}", said)
  assert max(runs.positions(workdir)) == max(losses(workdir)) == int(stopped) < config.num_steps

  last = max(losses(workdir))
  run = runs.Run(config, workdir)
  run.until(lambda: max(losses(workdir)) > last + 10)
  run.send(signal.SIGINT)
  assert (
    run.wait() == [130]
    and "Once more ends the run at once." in run.said
    and "Goes on after step " in run.said
    and "Traceback" not in run.said
  )
  (stopped,) = re.findall(rf"Ctrl-C: saved after step (\d+) of {config.num_steps}", run.said)
  assert max(runs.positions(workdir)) == max(losses(workdir)) == int(stopped) < config.num_steps

  runs.Run(config, workdir).finish()
  assert_same_run(workdir, whole)


def test_two_processes_stop_together(config, tmp_path):
  config = dataclasses.replace(config, num_steps=100_000, save_every=0, mesh="data:2")
  stopped = []
  for which, number in (((1,), signal.SIGUSR1), ((0, 1), signal.SIGTERM)):
    run = runs.Run(config, tmp_path / "run", processes=2)
    run.until_step(tmp_path / "run", 5 + sum(stopped))
    run.send(number, *which)
    said = run.finish(60)
    steps = re.findall(r"SIG[A-Z0-9]+: saved after step (\d+)", said)
    (step,) = set(steps)  # both say it, and say the same
    assert len(steps) == 2 and f"{number.name}: saved" in said
    stopped.append(int(step))
    assert max(runs.positions(tmp_path / "run").items()) == (stopped[-1], stopped[-1] * BATCH)

  # What was stopped twice is what was never stopped.
  run = runs.Run(config, tmp_path / "whole", processes=2)
  run.until_step(tmp_path / "whole", stopped[-1])
  run.send(signal.SIGKILL)
  run.wait()
  assert losses(tmp_path / "run") == {s: x for s, x in losses(tmp_path / "whole").items() if s <= stopped[-1]}


def test_one_process_that_fails_ends_the_others(config, whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole / "data", workdir / "data")
  _flip(_rows_file(workdir), 100)
  run = runs.Run(dataclasses.replace(config, save_every=0), workdir, processes=2)
  assert 0 not in run.wait(100)
  assert "Process" in run.said and f"{workdir}/data/train" in run.said


def _largest(directory: Path) -> Path:
  return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(path: Path, places: int = 1) -> None:
  """Changes one bit in each of so many places, evenly spread."""
  contents = bytearray(path.read_bytes())
  for place in range(1, places + 1):
    contents[len(contents) * place // (places + 1)] ^= 1
  path.write_bytes(contents)


def _truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
  "truncated": lambda newest: _truncate(_largest(newest)),
  "deleted": lambda newest: _largest(newest).unlink(),
  "flipped": lambda newest: _flip(_largest(newest)),
  "no manifest": lambda newest: (newest / "digests.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(config, whole, copy, capsys, damage):
  newest = str(config.num_steps)
  DAMAGES[damage](copy / "training" / newest)
  shutil.rmtree(copy / "checkpoint")
  train(config, copy)
  said = capsys.readouterr().err
  assert re.search(
    rf"Checkpoint {copy}/training/{newest} is damaged: .+\. It was moved to {copy}/damaged/{newest}-\d+\.", said
  )
  assert [path.name.split("-")[0] for path in (copy / "damaged").iterdir()] == [newest]
  assert_same_run(copy, whole)


def test_no_whole_checkpoint_is_no_new_start(config, copy, capsys):
  metrics = (copy / "metrics.jsonl").read_bytes()
  for step in states(copy):
    DAMAGES["flipped"](copy / "training" / step)
  for _ in range(2):
    with pytest.raises(ValueError, match=r"No checkpoint in .*training is whole, so the run cannot go on"):
      train(config, copy)
    assert capsys.readouterr().err.count("is damaged") == 3
  assert states(copy) == last_states(config) and (copy / "metrics.jsonl").read_bytes() == metrics


@contextlib.contextmanager
def _small_files():
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_checkpoint_not_the_run(config, whole, tmp_path):
  workdir = tmp_path / "run"
  run = runs.Run(config, workdir)
  first = str(config.save_every)
  run.until((workdir / "training" / first).exists)
  (child,) = run.processes
  unlimited = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
  resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (SMALL, unlimited[1]))
  run.until(lambda: "Training goes on; older checkpoints are kept." in run.said)
  assert first in states(workdir)
  resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)
  assert re.search(rf"checkpoint {workdir}/training/\d+", run.finish())
  assert states(workdir)[-1] == str(config.num_steps) and first not in states(workdir)
  assert_same_run(workdir, whole)


@pytest.mark.parametrize("unwritten", ["state", "model"])
def test_what_could_not_be_written_at_the_end_is_an_error(config, whole, copy, unwritten):
  *older, newest = last_states(config)
  shutil.rmtree(copy / "training" / newest)
  shutil.rmtree(copy / "checkpoint")
  changed = config if unwritten == "state" else dataclasses.replace(config, save_every=0)
  with (
    _small_files(),
    pytest.raises((OSError, ValueError), match=f"training/{newest}" if unwritten == "state" else "checkp"),
  ):
    train(changed, copy)
  # Threads of the failed save may have left something more; the next start removes it.
  assert [name for name in states(copy) if name.isdigit()] == older
  assert [path.name for path in copy.iterdir() if path.name.startswith("checkpoint")] == []
  train(config, copy)
  assert states(copy) == [*older, newest]
  assert_same_run(copy, whole)


def _poisoned(start: Path, token: int, directory: Path) -> Path:
  """A model in which one token is NaN, and with it whatever follows it in its row."""
  model = load_model(start)
  table = model.params["embed_tokens"]["embedding"].at[token].set(np.nan)
  params = {**model.params, "embed_tokens": {"embedding": table}}
  save_model(directory, config=model.config, params=params, tokenizer_files=model.tokenizer_files, source={})
  return directory


def _restored(workdir: Path, step: int):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(workdir / "training" / str(step) / "state")


def test_a_nan_batch_changes_nothing_and_is_counted(start, text, whole, tmp_path):
  rows = loading.PackedDataset(whole / "data/train")
  seen = np.stack([rows[number]["tokens"] for number in range(len(rows))])
  held = np.stack([row["tokens"] for row in loading.heldout_batches(whole / "data/heldout", batch_size=1)])
  sources = ((str(whole / "data/train"), 1.0),)

  def bad_steps(token):
    batches = [loading.rows_of_batch(sources, batch_size=BATCH, seed=0, step=step) for step in range(8)]
    numbers = [[int(name.split()[-1]) for name in batch] for batch in batches]
    # The last token of a row is a target only.
    return [step for step, batch in enumerate(numbers, start=1) if (seen[batch, :-1] == token).any()]

  token = next(t for t in range(tiny.VOCAB) if 1 <= len(bad_steps(t)) <= 3 and 1 not in bad_steps(t) and t not in held)
  bad = bad_steps(token)
  poisoned = _poisoned(start, token, tmp_path / "model")
  config = make_config(poisoned, text, num_steps=8, batch_size=BATCH, save_every=1, keep_checkpoints=8)
  train(config, tmp_path / "run")

  records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
  assert [r["step"] for r in records if r["loss"] is None] == bad
  assert [r["skipped"] for r in records] == [sum(step <= r["step"] for step in bad) for r in records]
  for step in range(2, 9):
    before, after = _restored(tmp_path / "run", step - 1), _restored(tmp_path / "run", step)
    kept = [
      np.array_equal(old, new, equal_nan=True)
      for name in ("params", "opt_state")
      for old, new in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True)
    ]
    assert all(kept) if step in bad else not any(kept)


def test_nan_in_every_batch_ends_the_run_and_names_rows(start, text, whole, tmp_path):
  rows = loading.PackedDataset(whole / "data/train")
  counts = np.bincount(np.concatenate([np.unique(rows[n]["tokens"][:-1]) for n in range(len(rows))]))
  token = int(counts.argmax())
  poisoned = _poisoned(start, token, tmp_path / "model")
  config = make_config(poisoned, text, num_steps=20, batch_size=BATCH, max_skipped=3)
  with pytest.raises(
    ValueError, match=r"3 batches in a row .* changed last at step 0\. The rows of its batch"
  ) as caught:
    train(config, tmp_path / "run")
  named = [int(number) for number in re.findall(r"data/train, row (\d+)", str(caught.value))]
  assert len(named) == BATCH and any((rows[number]["tokens"][:-1] == token).any() for number in named)
  sources = ((str(whole / "data/train"), 1.0),)
  wanted = loading.rows_of_batch(sources, batch_size=BATCH, seed=0, step=2)
  assert named == [int(name.split()[-1]) for name in wanted]


def _rows_file(workdir: Path) -> Path:
  return workdir / "data/train/rows-00000.array_record"


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    (lambda workdir: _rows_file(workdir).unlink(), "data/train"),
    (lambda workdir: _flip(_rows_file(workdir), 100), "data/train"),
    (lambda workdir: _truncate(_rows_file(workdir)), "data/train"),
    (lambda workdir: (workdir / "data/train/meta.json").write_text("{"), "meta.json"),
  ],
  ids=["deleted", "flipped", "truncated", "meta"],
)
def test_damaged_rows_are_named(config, copy, damage, named):
  shutil.rmtree(copy / "training" / str(config.num_steps))
  damage(copy)
  with pytest.raises((ValueError, OSError), match=named):
    train(dataclasses.replace(config, save_every=0), copy)
