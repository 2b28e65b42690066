"""A teacher becomes an RNN twice, in about the same time: with a window of its softmax, and from the paper's start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supra_jax.core.plain_json import to_json
from supra_jax.inference.lm import load
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.linearize import SINKS, Calibration, Phi, linearize_checkpoint
from supra_jax.model.config import SupraConfig
from supra_jax.training.config import TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics
from supra_jax.training.pictures import plot_curves
from supra_jax.training.setup import heldout_nll, prepare_data
from supra_jax.training.workdir import METRICS_FILE

NAMES = {"window": "a window", "random": "the paper's start"}


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, and how it began.

  Attributes:
    calibration_seconds: before its first step; 0 without calibration.
    tokens_per_second: of its steps.
    points: (tokens trained on, seconds, held-out loss in nats a token) of each evaluation. The seconds are those of
      calibration and steps; evaluations and compilation are left out.
  """

  calibration_seconds: float
  tokens_per_second: float
  points: list[tuple[int, float, float]]

  @property
  def seconds(self) -> float:
    return self.points[-1][1]

  @property
  def nll(self) -> float:
    return self.points[-1][2]


def compare_starts(
  teacher: Path,
  window: TrainConfig,
  random: TrainConfig,
  workdir: Path,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Uptrains from both starts on the same text, and draws their losses against time into `starts.png`.

  The run with a window is `workdir` itself, the other lies in `workdir/random`. A second call finds what is done.

  Args:
    teacher: model directory of the transformer.
    window, random: the recipes, which may differ in the schedule.
    workdir: where everything goes.
    say: gets a line of progress at a time.

  Returns:
    What happened, for JSON.
  """
  lm = load(teacher)
  ((text, _),), heldout = prepare_data(window.data, lm.tokenizer, lm.config.vocab_size, workdir / "data")
  rows: dict[str, Any] = {"batch_size": window.rows_a_microbatch, "max_rows": window.data.heldout_rows}
  teacher_nll = heldout_nll(lm.model, lm.params, heldout, **rows)
  del lm
  say(f"Teacher, a transformer: held-out loss {teacher_nll:.4f} nats a token.")
  packed = dataclasses.replace(window.data, input="", sources=text, heldout=str(heldout))
  window, random = (dataclasses.replace(config, data=packed) for config in (window, random))
  seen = SupraConfig.window
  say(
    f"Softmax sees the last {seen} tokens and the first {SINKS}, linear attention all of them: an RNN. It is uptrained."
  )
  first = run_from(teacher, "identity", None, window, workdir, window=seen, teacher_nll=teacher_nll)
  say(f"From the paper's start, phi random, {random.num_steps} steps in place of {window.num_steps}.")
  second = run_from(teacher, "random", None, random, workdir / "random", teacher_nll=teacher_nll)
  runs = {"window": first, "random": second}
  minutes = {NAMES[name]: [[(seconds / 60, nll) for _, seconds, nll in run.points]] for name, run in runs.items()}
  plot_curves(minutes, workdir / "starts.png", teacher_nll=teacher_nll, x="minutes")
  for name, run in runs.items():
    say(f"After {run.seconds / 60:.1f} minutes with {NAMES[name]}: {run.nll:.4f} nats a token.")
  return {"teacher_nll": teacher_nll} | {name: dataclasses.asdict(run) for name, run in runs.items()}


def run_from(
  teacher: str | Path,
  phi: Phi,
  calibration: Calibration | None,
  config: TrainConfig,
  workdir: Path,
  *,
  window: int | None = None,
  start: Path | None = None,
  teacher_nll: float | None = None,
) -> Run:
  """Linearises, once and timed, and uptrains.

  Args:
    teacher, phi, calibration, window: as `linearize_checkpoint` takes them.
    config: of the uptraining; `init_checkpoint` is passed over.
    workdir: of the run.
    start: where the linearised model goes, or lies; None: into the workdir.
    teacher_nll: as `train` takes it.
  """
  start = start or workdir / "linearized"

  # Measured the first time, so that a second call has the same.
  measured = start.with_name(f"{start.name}_seconds.json")
  if not measured.exists():
    shutil.rmtree(start, ignore_errors=True)
    began = time.monotonic()
    with contextlib.nullcontext() if calibration is None else shown() as report:
      new: dict[str, Any] = {"phi": phi, "seed": config.seed, "window": window, "calibration": calibration}
      linearize_checkpoint(teacher, start, **new, report=report)
    measured.write_text(to_json(0.0 if calibration is None else time.monotonic() - began))
  calibration_seconds = json.loads(measured.read_text())
  speed = train(
    dataclasses.replace(config, init_checkpoint=str(start)), workdir, teacher_nll=teacher_nll
  ).tokens_per_second
  points = [
    (record["tokens"], calibration_seconds + record["tokens"] / speed, record["heldout_nll"])
    for record in read_metrics(workdir / METRICS_FILE)
    if "heldout_nll" in record
  ]
  return Run(calibration_seconds, speed, points)
