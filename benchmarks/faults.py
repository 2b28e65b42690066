"""Injects the faults of long runs into a small one: kills, damaged states, full disks, NaN. A run should recover.

    python -m benchmarks.faults --workdir=DIR [--kills=50] [--processes=1,2] [--output=FILE.json]

Every run is the real program. Runs with a fault are compared with one without: losses and the exported model bit for
bit, and the position in the data of every training state. Exits with status 1 if anything differs.
`tests/training/test_faults.py` is the short form.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import runs
from supra_jax.bin.entry import run as run_main
from supra_jax.core.plain_json import to_json
from supra_jax.data.loading import PackedDataset
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import read_metrics

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all runs; must not exist.", required=True)
_KILLS = flags.DEFINE_integer("kills", 50, "SIGKILLs to send for each number in --processes.", lower_bound=0)
_PROCESSES = flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes that a run is tried with.")
_SEED = flags.DEFINE_integer("seed", 0, "Seeds the random times of kills.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/faults.json", "JSON file to write the table to.")

BATCH = 8
# Fewer steps for several processes, which spend their time waiting for each other on few cores.
STEPS = {1: 1000, 2: 200}
DISK_BYTES = 16 * 2**20


@dataclasses.dataclass
class Row:
  """A row of the table: a fault and how runs recovered from it.

  Attributes:
    fault: name of the fault.
    processes: number of processes of the run.
    times: number of times that the fault was injected.
    saves_hit: number of times at which a training state was being written.
    resumes: number of starts from a training state.
    steps_lost: number of steps that had to be repeated.
    mismatches: number of failed checks; `notes` describes each.
    seconds: longest time from the fault, or from the start with it, to the run's reaction; None where not measured.
    notes: failed checks, and other observations.
  """

  fault: str
  processes: int = 1
  times: int = 1
  saves_hit: int = 0
  resumes: int = 0
  steps_lost: int = 0
  mismatches: int = 0
  seconds: float | None = None
  notes: list[str] = dataclasses.field(default_factory=list)

  def check(self, right: bool, wrong: str) -> None:
    """Counts a mismatch and notes `wrong`, unless `right`."""
    if not right:
      self.mismatches += 1
      self.notes.append(wrong)

  def took(self, seconds: float) -> None:
    self.seconds = max(self.seconds or 0, seconds)


class Soak:
  """Makes runs with and without faults, and compares them.

  Attributes:
    directory: directory of all runs.
    random: random number generator of the times of faults.
    model: model directory that the runs start from.
  """

  def __init__(self, directory: Path, seed: int):
    directory.mkdir(parents=True)
    self.directory, self.random = directory.absolute(), random.Random(seed)
    self.model = tiny.write_checkpoint(self.directory / "model", "supra")
    self._number = 0

  def config(self, processes: int = 1, **changes) -> TrainConfig:
    values = {"num_steps": STEPS.get(processes, STEPS[2]), "batch_size": BATCH, "save_every": 10, "keep_checkpoints": 3}
    return runs.make_config(self.model, "pydoc:topics", **(values | changes))

  def start(self, workdir: Path, config: TrainConfig, processes: int = 1) -> runs.Run:
    return runs.Run(config, workdir, processes=processes, cache=self.directory / "programs")

  def new(self, name: str) -> Path:
    self._number += 1
    return self.directory / f"{self._number:03}_{name}"

  def whole(self, processes: int = 1) -> Path:
    """Workdir of the run without a fault, which is run the first time."""
    workdir = self.directory / f"whole_{processes}"
    if not workdir.exists():
      self.start(workdir, self.config(processes), processes).finish(3600)
    return workdir

  def copy(self, name: str) -> Path:
    return shutil.copytree(self.whole(), self.new(name))

  def compare(self, row: Row, workdir: Path, processes: int = 1, *, all_losses: bool = True) -> None:
    """Compares a finished run with the one without a fault, and adds mismatches to `row`."""
    got, want = runs.losses(workdir), runs.losses(self.whole(processes))
    differ = [step for step in got if got[step] != want[step]]
    row.check(not differ, f"losses differ at steps {differ[:5]}")
    row.check(max(got) == max(want) and (not all_losses or len(got) == len(want)), f"{len(got)} losses of {len(want)}")
    got, want = (jax.tree.leaves(load_model(path / "checkpoint").params) for path in (workdir, self.whole(processes)))
    row.check(all(map(np.array_equal, got, want)), "the exported model differs")
    self.check_positions(row, workdir)

  def check_positions(self, row: Row, workdir: Path) -> None:
    for step, position in runs.positions(workdir).items():
      row.check(position == step * BATCH, f"after step {step} the data is at row {position}")


def _partial(workdir: Path) -> list[Path]:
  return list((workdir / "training").glob("*.orbax-checkpoint-tmp*"))


def _ended(run: runs.Run, row: Row, workdir: Path) -> bool:
  """Whether any process of a run has ended; if so, waits for all and checks that they succeeded."""
  if all(process.poll() is None for process in run.processes):
    return False
  row.check(run.wait(60) == [0] * len(run.processes), f"{workdir.name} ended: {run.said[-500:]}")
  return True


def _until_it_trains(run: runs.Run, workdir: Path) -> None:
  """Waits for the first training step after a start, or for the end of the run."""
  events = workdir / "tensorboard"
  seen, restored = len(list(events.glob("*"))), max(runs.positions(workdir), default=0)
  # Each start makes a file of events, after it has removed the records of lost steps.
  run.until(lambda: len(list(events.glob("*"))) > seen)
  run.until(lambda: max(runs.losses(workdir), default=0) > restored or "Held-out" in run.said)


def kill(soak: Soak, processes: int, wanted: int) -> Row:
  """Sends SIGKILL at random times, a third of them during a save; starts runs until `wanted` signals are sent."""
  row = Row("kill -9", processes, times=0)
  workdir = soak.new("kill")
  while row.times < wanted:
    run = soak.start(workdir, soak.config(processes), processes)
    row.resumes += bool(runs.positions(workdir))
    _until_it_trains(run, workdir)
    moment = time.monotonic() + soak.random.uniform(0.2, 6)
    aimed = soak.random.random() < 1 / 3
    while not (ended := _ended(run, row, workdir)) and time.monotonic() < moment:
      if aimed and _partial(workdir):
        time.sleep(soak.random.uniform(0, 0.05))
        break
      time.sleep(0.001)
    if not ended:
      # With several processes, in 30 % of the cases kills only one: the others have to notice.
      which = () if processes == 1 or soak.random.random() < 0.7 else (soak.random.randrange(processes),)
      began = time.monotonic()
      run.send(signal.SIGKILL, *which)
      row.times += 1
      row.saves_hit += bool(_partial(workdir))
      row.check(0 not in run.wait(200), "a process ended well beside one that was killed")
      row.took(time.monotonic() - began)
      soak.check_positions(row, workdir)
      row.steps_lost += max(runs.losses(workdir), default=0) - max(runs.positions(workdir), default=0)
    if ended or row.times == wanted:
      if not ended:
        row.resumes += bool(runs.positions(workdir))
        soak.start(workdir, soak.config(processes), processes).finish(3600)
      soak.compare(row, workdir, processes)
      workdir = soak.new("kill")
  return row


def terminate(soak: Soak, processes: int, which: tuple[int, ...]) -> Row:
  """Sends SIGTERM to the processes of a run that `which` lists, or to all if it is empty."""
  row = Row(f"SIGTERM to {'all' if not which else 'one'}" if processes > 1 else "SIGTERM", processes)
  workdir, config = soak.new("sigterm"), soak.config(processes)
  run = soak.start(workdir, config, processes)
  run.until_step(workdir, 15)
  began = time.monotonic()
  run.send(signal.SIGTERM, *which)
  run.until(lambda: run.said.count("SIGTERM: saved") == processes)
  row.took(time.monotonic() - began)
  row.check(run.wait(120) == [0] * processes, f"exit statuses: {run.said[-500:]}")
  row.notes.append(f"the last process was gone after {time.monotonic() - began:.1f} s")
  steps = set(map(int, re.findall(r"SIGTERM: saved after step (\d+)", run.said)))
  row.check(len(steps) == 1 and steps == {max(runs.positions(workdir), default=0)}, f"saved after steps {steps}")
  row.steps_lost = max(runs.losses(workdir)) - max(steps, default=0)
  row.resumes = 1
  soak.start(workdir, config, processes).finish(3600)
  soak.compare(row, workdir, processes)
  return row


def flip(path: Path, places: int = 1) -> None:
  """Flips one bit of a file in each of `places` bytes, evenly spread."""
  contents = bytearray(path.read_bytes())
  for place in range(1, places + 1):
    contents[len(contents) * place // (places + 1)] ^= 1
  path.write_bytes(contents)


def _largest(directory: Path) -> Path:
  return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES: dict[str, Callable[[Path], None]] = {
  "truncated file": lambda state: os.truncate(_largest(state), _largest(state).stat().st_size - 7),
  "deleted file": lambda state: _largest(state).unlink(),
  "flipped bit": lambda state: flip(_largest(state)),
  "no manifest": lambda state: (state / "digests.json").unlink(),
}


def damage(soak: Soak, name: str) -> Row:
  """Damages the newest training state: a run should resume from the one before."""
  row, workdir = Row(f"newest state: {name}", resumes=1), soak.copy("damaged")
  newest = max(runs.positions(workdir))
  DAMAGES[name](workdir / "training" / str(newest))
  shutil.rmtree(workdir / "checkpoint")
  said = soak.start(workdir, soak.config()).finish()
  row.check(f"training/{newest} is damaged" in said, f"the state is not named: {said[-500:]}")
  row.check(len(list((workdir / "damaged").iterdir())) == 1, "it was not moved aside")
  row.steps_lost = 10
  soak.compare(row, workdir)
  return row


def refuse(soak: Soak, fault: str, hurt: Callable[[Path], None], named: str, **changes) -> Row:
  """Breaks a run for good: a start should print a one-line error, exit with status 1, and leave all states alone.

  `hurt` injects the fault into a workdir, or `changes` change the config; the regex `named` has to match the error.
  """
  row, workdir = Row(fault), soak.copy("refused")
  # Without its last state the run has steps left to do.
  shutil.rmtree(workdir / "training" / str(max(runs.positions(workdir))))
  hurt(workdir)
  before = sorted(path.name for path in (workdir / "training").iterdir())
  began = time.monotonic()
  run = soak.start(workdir, soak.config(**changes))
  row.check(run.wait() == [1], "exit status is not 1")
  row.took(time.monotonic() - began)
  said = [line for line in run.said.splitlines() if line.startswith("error: ")]
  row.check(len(said) == 1 and bool(re.search(named, said[0])), f"said {run.said[-500:]}")
  row.check("Traceback" not in run.said, "a traceback")
  row.check(before == sorted(path.name for path in (workdir / "training").iterdir()), "training states changed")
  row.notes += [line[:200] for line in said]
  return row


def full_disk(soak: Soak, *, freed: bool) -> Row:
  """Fills the disk of a run, a small tmpfs: for a while if `freed`, else to the end."""
  row = Row(f"disk full {'for a while' if freed else 'to the end'}")
  disk = soak.new("disk")
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", disk], capture_output=True)
  if mounted.returncode:
    row.times, row.notes = 0, [f"not done, for want of a small disk: {mounted.stderr.decode().strip()}"]
    return row
  try:
    workdir, ballast = disk / "run", disk / "ballast"
    run = soak.start(workdir, soak.config())
    run.until(lambda: bool(runs.positions(workdir)))
    with ballast.open("wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(2**14))
      except OSError:
        pass
    older = set(runs.positions(workdir))
    run.until(lambda: "could not be written" in run.said and "Training goes on" in run.said)
    row.check(older <= set(runs.positions(workdir)), "an older state is gone")
    if freed:
      ballast.unlink()
      row.check(run.wait() == [0], f"exit status is not 0: {run.said[-500:]}")
      soak.compare(row, workdir, all_losses=False)
    else:
      row.check(run.wait() == [1] and "error: " in run.said, f"exit status is not 1: {run.said[-500:]}")
      row.check(older <= set(runs.positions(workdir)), "an older state is gone")
      ballast.unlink()
      row.resumes = 1
      soak.start(workdir, soak.config()).finish()
      soak.compare(row, workdir)
    row.check(not _partial(workdir), "a half-written state is left")
    row.notes.append(f"{run.said.count('could not be written')} times said that something could not be written")
  finally:
    subprocess.run(["umount", disk], check=True)
  return row


def nan(soak: Soak, *, everywhere: bool) -> Row:
  """Sets a token's embedding to NaN: batches with a rare token are skipped; a token in every batch ends the run."""
  row = Row("NaN in every batch" if everywhere else "NaN in a few batches")
  rows = PackedDataset(soak.whole() / "data/train")
  counts = np.zeros(tiny.VOCAB, int)
  for number in range(len(rows)):
    counts[np.unique(rows[number]["tokens"][:-1])] += 1
  token = int(counts.argmax() if everywhere else np.where(counts > 0, counts, counts.max()).argmin())
  model = load_model(soak.model)
  table = model.params["embed_tokens"]["embedding"].at[token].set(np.nan)
  params = {**model.params, "embed_tokens": {"embedding": table}}
  poisoned, workdir = soak.new("nan_model"), soak.new("nan")
  save_model(poisoned, config=model.config, params=params, tokenizer_files=model.tokenizer_files, source={})
  run = soak.start(workdir, soak.config(init_checkpoint=str(poisoned), max_skipped=3))
  statuses = run.wait()
  if everywhere:
    row.check(statuses == [1], "exit status is not 1")
    named = [int(number) for number in re.findall(r"data/train, row (\d+)", run.said)]
    row.check(len(named) == BATCH, f"named {len(named)} rows: {run.said[-500:]}")
    row.check(any((rows[number]["tokens"][:-1] == token).any() for number in named), "no named row has the token")
  else:
    row.check(statuses == [0], f"exit status is not 0: {run.said[-500:]}")
    records = [record for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
    bad = sum(record["loss"] is None for record in records)
    row.check(0 < bad == records[-1]["skipped"], f"{bad} bad batches, {records[-1]['skipped']} counted")
    row.notes.append(f"{bad} of {len(records)} batches skipped")
  return row


def faults(soak: Soak, processes: list[int]):
  """Injects all faults, and yields a row of the table for each."""
  for count in processes:
    yield kill(soak, count, _KILLS.value)
    for which in [()] if count == 1 else [(count - 1,), ()]:
      yield terminate(soak, count, which)
  for name in DAMAGES:
    yield damage(soak, name)

  def damage_all(workdir):
    for step in runs.positions(workdir):
      flip(_largest(workdir / "training" / str(step)))

  rows_file = "data/train/rows-00000.array_record"
  yield refuse(soak, "all states damaged", damage_all, "No checkpoint in .* is whole")
  yield full_disk(soak, freed=True)
  yield full_disk(soak, freed=False)
  yield nan(soak, everywhere=False)
  yield nan(soak, everywhere=True)
  yield refuse(soak, "rows deleted", lambda workdir: (workdir / rows_file).unlink(), "data/train")
  yield refuse(soak, "rows damaged", lambda workdir: flip(workdir / rows_file, 200), "data/train")
  yield refuse(soak, "another config", lambda _: None, "seed: 0 before, 1 now", seed=1)
  other = tiny.write_checkpoint(soak.directory / "other", "supra", intermediate_size=32)
  before = soak.model.rename(soak.directory / "model_before")
  other.rename(soak.model)
  yield refuse(soak, "another model", lambda _: None, "model.intermediate_size: 64 before, 32 now")
  other = soak.model.rename(other)
  before.rename(soak.model)


def main() -> None:
  began = time.monotonic()
  soak = Soak(Path(_WORKDIR.value), _SEED.value)
  rows = []
  print(
    f"{'fault':<32}{'processes':>10}{'times':>7}{'in a save':>11}{'resumes':>9}{'lost':>7}{'wrong':>7}{'seconds':>9}"
  )
  for row in faults(soak, [int(count) for count in _PROCESSES.value]):
    rows.append(row)
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    print(
      f"{row.fault:<32}{row.processes:>10}{row.times:>7}{row.saves_hit:>11}{row.resumes:>9}{row.steps_lost:>7}"
      f"{row.mismatches:>7}{seconds:>9}",
      flush=True,
    )
    for note in row.notes:
      print(f"  {note}", flush=True)
  result = {
    "seconds": round(time.monotonic() - began),
    "seed": _SEED.value,
    "steps": {str(count): STEPS.get(count, STEPS[2]) for count in map(int, _PROCESSES.value)},
    "python": platform.python_version(),
    "jax": jax.__version__,
    "cores": os.cpu_count(),
    "rows": [dataclasses.asdict(row) for row in rows],
  }
  Path(_OUTPUT.value).write_text(to_json(result, indent=2) + "\n")
  sys.exit(any(row.mismatches for row in rows))


if __name__ == "__main__":
  run_main(main)
