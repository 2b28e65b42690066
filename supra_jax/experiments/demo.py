"""The demo: linearises a teacher with two starts, a memory and the paper's, and uptrains both RNNs."""

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
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Memory, Random, Reading, Start
from supra_jax.training.config import TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics
from supra_jax.training.pictures import plot_curves
from supra_jax.training.setup import heldout_nll, prepare_data
from supra_jax.training.workdir import METRICS_FILE

NAMES = {"memory": "a memory", "random": "the paper's start"}
# Tokens of each key/value head: a quarter of the demo's rows. A state of as many as a row would lose nothing.
STATE_TOKENS = 68


@dataclasses.dataclass(frozen=True)
class Run:
  """The result of linearising a teacher and uptraining the RNN.

  Attributes:
    calibration_seconds: time of linearising with a start that reads a text, in seconds; 0 for other starts.
    tokens_per_second: speed of the training steps, over all devices.
    points: (tokens trained on, seconds, held-out loss in nats per token) of each evaluation. The seconds are those of
      calibration, and of the training steps at the speed `tokens_per_second`, without evaluations and compilation.
  """

  calibration_seconds: float
  tokens_per_second: float
  points: list[tuple[int, float, float]]

  @property
  def seconds(self) -> float:
    """Seconds of calibration and all training steps."""
    return self.points[-1][1]

  @property
  def nll(self) -> float:
    """Held-out loss at the end, in nats per token."""
    return self.points[-1][2]


def compare_starts(
  teacher: Path,
  memory: TrainConfig,
  random: TrainConfig,
  workdir: Path,
  *,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Uptrains from both starts on the same text, and plots their held-out losses against time in `starts.png`.

  The run with a memory has the workdir `workdir`, the other run `workdir/random`. A second call resumes an unfinished
  first one.

  Args:
    teacher: model directory of the transformer.
    memory: recipe of the run with a memory; its `data` has text to pack.
    random: recipe of the run from the paper's start. Its `data` is ignored: both runs read the data of `memory`.
    workdir: local directory that everything is written to.
    say: called with each line of progress.

  Returns:
    {"teacher_nll": the teacher's held-out loss in nats per token, "memory": the fields of the memory's `Run` as a dict,
    "random": those of the other `Run`}.

  Raises:
    FileNotFoundError: `teacher` is not a model directory, or the text is missing.
    ValueError: recipes, text and teacher do not fit each other, or as `run_from`.
  """
  lm = load(teacher)
  ((text, _),), heldout = prepare_data(memory.data, lm.tokenizer, lm.config.vocab_size, workdir / "data")
  rows: dict[str, Any] = {"batch_size": memory.rows_a_microbatch, "max_rows": memory.data.heldout_rows}
  teacher_nll = heldout_nll(lm.model, lm.params, heldout, **rows)
  del lm
  say(f"Teacher, a transformer: held-out loss {teacher_nll:.4f} nats a token.")
  packed = dataclasses.replace(memory.data, input="", sources=text, heldout=str(heldout))
  memory, random = (dataclasses.replace(config, data=packed) for config in (memory, random))
  start = Memory(state_tokens=STATE_TOKENS, data=text, batch_size=8)
  say(f"Softmax sees what a state of {STATE_TOKENS} tokens a head holds: an RNN. It is uptrained.")
  first = run_from(teacher, start, memory, workdir, teacher_nll=teacher_nll)
  say(f"From the paper's start, phi random, {random.num_steps} steps in place of {memory.num_steps}.")
  second = run_from(teacher, Random(random.seed), random, workdir / "random", teacher_nll=teacher_nll)
  runs = {"memory": first, "random": second}
  minutes = {NAMES[name]: [[(seconds / 60, nll) for _, seconds, nll in run.points]] for name, run in runs.items()}
  plot_curves(minutes, workdir / "starts.png", teacher_nll=teacher_nll, x="minutes")
  for name, run in runs.items():
    say(f"After {run.seconds / 60:.1f} minutes with {NAMES[name]}: {run.nll:.4f} nats a token.")
  return {"teacher_nll": teacher_nll} | {name: dataclasses.asdict(run) for name, run in runs.items()}


def run_from(
  teacher: str | Path,
  start: Start,
  config: TrainConfig,
  workdir: Path,
  *,
  linearized: Path | None = None,
  teacher_nll: float | None = None,
) -> Run:
  """Linearises a teacher, unless an earlier call did, and uptrains the linearised model.

  Args:
    teacher: model directory of the transformer.
    start: how the new parameters of the linearised layers are initialised.
    config: recipe of the uptraining; its `init_checkpoint` is ignored.
    workdir: directory of the run.
    linearized: model directory of the linearised model, reused if it is complete; None means `workdir/linearized`.
    teacher_nll: held-out loss of the teacher in nats per token, drawn as a line in the plot of the run; None: no line.

  Raises:
    ValueError, OSError, core.preemption.Preempted: as `linearize_checkpoint` and `training.loop.train`.
  """
  linearized = linearized or workdir / "linearized"

  # Kept in a file, so that a second call reports the time of the first.
  measured = linearized.with_name(f"{linearized.name}_seconds.json")
  if not measured.exists():
    shutil.rmtree(linearized, ignore_errors=True)
    began, reads = time.monotonic(), isinstance(start, Reading)
    with shown() if reads else contextlib.nullcontext() as progress:
      linearize_checkpoint(teacher, linearized, start, progress=progress)
    measured.write_text(to_json(time.monotonic() - began if reads else 0.0))
  calibration_seconds = json.loads(measured.read_text())
  speed = train(
    dataclasses.replace(config, init_checkpoint=str(linearized)), workdir, teacher_nll=teacher_nll
  ).tokens_per_second
  points = [
    (record["tokens"], calibration_seconds + record["tokens"] / speed, record["heldout_nll"])
    for record in read_metrics(workdir / METRICS_FILE)
    if "heldout_nll" in record
  ]
  return Run(calibration_seconds, speed, points)
