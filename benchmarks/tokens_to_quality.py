"""Measures held-out loss of linearised models against tokens and seconds of training: one curve per start.

    python -m benchmarks.tokens_to_quality --teacher=DIR --data=DIR --workdir=DIR [--methods=random,calibrated_32k] \
      [--seeds=0,1,2] [--num_steps=60] [--batch_size=2]

`--data` is a directory that `supra_jax.bin.prepare_data` packed, with held-out text. Every run is trained by
`supra_jax.training.loop` with AdamW and a cosine schedule of its own length. A killed benchmark resumes. Tokens that
the teacher reads too, in calibration and distillation, count twice. Writes a table, JSON, and two plots, against tokens
and against seconds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

import supra_jax
from benchmarks.machine import described
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.data.packed import load_info
from supra_jax.experiments.demo import run_from
from supra_jax.linearization.starts import Calibrated, Identity, Lolcats, Memory, Random, Reading, Start, Window
from supra_jax.model.adapters import AdapterConfig
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.optimizer import OptimizerConfig
from supra_jax.training.pictures import plot_curves
from supra_jax.training.setup import heldout_nll


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to linearise and to uptrain.

  Attributes:
    start: start of the layers; text and seed of a calibration are filled in later.
    learning_rate: peak learning rate of the uptraining.
    share: number of steps as a fraction of --num_steps.
    stages: fields of the `TrainConfig` to change; `distill_from` is filled in for those that need a teacher.
    end_learning_rate: learning rate at the end of the cosine; equal to `learning_rate` it makes the rate constant.
  """

  start: Start
  learning_rate: float
  share: float = 1.0
  stages: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  end_learning_rate: float = 1e-5


SLOW: dict[str, Any] = {"new_weights_rate": 0.1}
ADAPTERS: dict[str, Any] = {"adapters": AdapterConfig(rank=16), "distill_weight": 0.5}
METHODS = {
  # The paper's start.
  "random": Method(Random(), 1e-3),
  "random_3e-4": Method(Random(), 3e-4),
  "random_2e-3": Method(Random(), 2e-3),
  "identity": Method(Identity(), 1e-3),
  # Calibrated starts, the first few with about a tenth of the tokens.
  "calibrated_512": Method(Calibrated(tokens=512), 1e-4, share=0.1),
  "calibrated_2k": Method(Calibrated(tokens=2048), 1e-4, share=0.1),
  "calibrated_4k": Method(Calibrated(tokens=4096), 1e-4, share=0.09),
  "calibrated_8k": Method(Calibrated(tokens=8192), 1e-4),
  "calibrated_16k": Method(Calibrated(tokens=16384), 1e-4),
  "calibrated_32k": Method(Calibrated(tokens=32768), 1e-4),
  "calibrated_32k_3e-4": Method(Calibrated(tokens=32768), 3e-4),
  "calibrated_32k_3e-5": Method(Calibrated(tokens=32768), 3e-5),
  "calibrated_131k": Method(Calibrated(tokens=131072), 1e-4),
  # Softmax over the last and the first tokens stays; the new weights train at a tenth of the learning rate, at the full
  # rate, or not at all.
  "window": Method(Window(), 1e-4, share=0.1, stages=SLOW),
  "window_half": Method(Window(), 1e-4, share=0.5, stages=SLOW),
  "window_3e-5": Method(Window(), 3e-5, share=0.1, stages=SLOW),
  "window_logits_half": Method(Window(), 1e-4, share=0.5, stages=SLOW | {"distill_weight": 1.0}),
  "window_adapters_half": Method(
    Window(), 1e-3, share=0.5, stages={"new_weights_rate": 0.01, "adapters": AdapterConfig(rank=16)}
  ),
  "window_rate_1": Method(Window(), 1e-4, share=0.1),
  "window_rate_1_half": Method(Window(), 1e-4, share=0.5),
  "window_alone_half": Method(Window(), 1e-4, share=0.5, stages={"trainable": "^(?!.*linear_o_proj)"}),
  # What each stage adds to calibrated_8k in half of the steps.
  "8k_half": Method(Calibrated(tokens=8192), 1e-4, share=0.5),
  "8k_half_3e-5": Method(Calibrated(tokens=8192), 3e-5, share=0.5),
  "8k_half_3e-4": Method(Calibrated(tokens=8192), 3e-4, share=0.5),
  "8k_half_constant": Method(Calibrated(tokens=8192), 1e-4, share=0.5, end_learning_rate=1e-4),
  "8k_transfer": Method(Calibrated(tokens=8192), 1e-4, share=0.5, stages={"transfer_steps": 10}),
  "8k_hidden": Method(Calibrated(tokens=8192), 1e-4, share=0.5, stages={"distill_weight": 0.0, "distill_hidden": 1.0}),
  "8k_logits": Method(Calibrated(tokens=8192), 1e-4, share=0.5, stages={"distill_weight": 1.0}),
  "8k_adapters": Method(Calibrated(tokens=8192), 1e-3, share=0.5, stages={"adapters": AdapterConfig(rank=16)}),
  # States of SmolLM2 of as many bytes as 260 tokens a head, or a little less. The linear attention of a window alone
  # stays 0, so that its state is none. LoLCATs' two stages have half of the steps of 48 each.
  "memory_260": Method(Memory(state_tokens=260), 1e-3, stages=ADAPTERS),
  "window_254_alone": Method(Window(window=254), 1e-3, stages=ADAPTERS | {"trainable": "/lora_[ab]$"}),
  "window_64_linear": Method(Window(window=64), 1e-3, stages=ADAPTERS | {"new_weights_rate": 0.02}),
  "lolcats_126": Method(
    Lolcats(window=126), 1e-3, stages=ADAPTERS | {"transfer_steps": 24, "transfer": "hedgehog|window_factor"}
  ),
}


def read_by_teacher(config: TrainConfig, trained: int) -> int:
  """Number of tokens that the teacher has read in a run that has trained on `trained` tokens."""
  if not config.distill_from:
    return 0
  if config.distill_weight or config.distill_hidden:
    return trained
  return min(trained, config.transfer_steps * config.tokens_a_step)


def one_run(name: str, seed: int, config: TrainConfig, workdir: Path) -> dict[str, Any]:
  """Linearises and uptrains once, unless an earlier call did.

  Returns:
    The fields of `experiments.demo.Run` as a dict, with points [tokens, seconds, held-out loss], and the seed.
  """
  method, directory = METHODS[name], workdir / f"{name}-{seed}"
  result = directory / "result.json"
  if result.exists():
    return json.loads(result.read_text())
  start = dataclasses.replace(method.start, seed=seed) if hasattr(method.start, "seed") else method.start
  read_before = 0
  if isinstance(start, Reading):
    rows, read_before = max(min(8, start.tokens // config.data.sequence_length), 1), start.tokens
    start = dataclasses.replace(start, data=config.data.sources, batch_size=rows)
  steps = max(round(config.num_steps * method.share), 1)
  every = max(round(config.evaluate_every * method.share), 1)
  optimizer = dataclasses.replace(
    config.optimizer,
    learning_rate=method.learning_rate * _RATE_SCALE.value,
    end_learning_rate=method.end_learning_rate,
    warmup_steps=min(config.optimizer.warmup_steps, steps),
  )
  changes: dict[str, Any] = {"num_steps": steps, "evaluate_every": every, "save_every": every, **method.stages}
  if {"distill_weight", "distill_hidden", "transfer_steps"} & changes.keys():
    changes = {"distill_weight": 0.0, "distill_from": _TEACHER.value} | changes
  config = dataclasses.replace(config, optimizer=optimizer, seed=seed, **changes)
  linearized = (
    workdir / "starts" / "-".join(map(str, [start.method, read_before, getattr(start, "window", None), seed]))
  )
  linearized.parent.mkdir(exist_ok=True)
  done = run_from(_TEACHER.value, start, config, directory, linearized=linearized)
  points = [
    [2 * read_before + tokens + read_by_teacher(config, tokens), seconds, nll] for tokens, seconds, nll in done.points
  ]
  result.write_text(to_json({"seed": seed, **dataclasses.asdict(done), "points": points}))
  for left in ("checkpoint", "training"):
    shutil.rmtree(directory / left)
  return json.loads(result.read_text())


def table(methods: dict[str, list[dict[str, Any]]]) -> str:
  """Formats held-out losses before training, in the middle and at the end: means over seeds, and ranges."""
  lines = ["| start | tokens before | loss before | half of the steps | all steps |", "| --- | --- | --- | --- | --- |"]
  for name, runs in methods.items():
    count = len(runs[0]["points"])
    cells = []
    for at in (0, count // 2, count - 1):
      losses = [r["points"][at][2] for r in runs]
      cells.append(f"{statistics.fmean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})")
    lines.append(f"| {name} | {runs[0]['points'][0][0]:,} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def in_a_tenth(methods: dict[str, list[dict[str, Any]]], slow: str) -> str:
  """Compares the loss of method `slow` after N tokens with the best loss of any other method after at most N / 10."""

  def means(name: str) -> list[tuple[float, float]]:
    curves = [run["points"] for run in methods[name]]
    return [(at[0][0], statistics.fmean(point[2] for point in at)) for at in zip(*curves, strict=True)]

  others = [(tokens, loss, name) for name in methods if name != slow for tokens, loss in means(name)]
  lines = [f"| tokens | {slow} | in at most a tenth of them |", "| --- | --- | --- |"]
  for tokens, loss in means(slow)[1:]:
    reached = [(other, name, at) for at, other, name in others if at <= tokens / 10]
    best, name, at = min(reached, default=(float("nan"), "nothing measured", 0))
    lines.append(f"| {tokens:,} | {loss:.2f} | {best:.2f} ({name} at {at:,}) |")
  return "\n".join(lines)


def by_seconds(runs: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
  """Returns the points (seconds, loss) of each run, with the seconds of the fastest run.

  Runs with other seeds do the same work, so that differences in seconds come from other load on the machine.
  """
  quickest = [min(point[1] for point in at) for at in zip(*(run["points"] for run in runs), strict=True)]
  return [[(s, point[2]) for s, point in zip(quickest, run["points"], strict=True)] for run in runs]


def main() -> None:
  workdir, data = Path(_WORKDIR.value), Path(_DATA.value)
  workdir.mkdir(parents=True, exist_ok=True)
  names, seeds = _METHODS.value, [int(seed) for seed in _SEEDS.value]
  if unknown := sorted(set(names) - METHODS.keys()):
    raise ValueError(f"--methods={','.join(unknown)}: wanted some of {', '.join(METHODS)}.")
  config = TrainConfig(
    init_checkpoint=_TEACHER.value,
    data=DataConfig(
      sources=str(data / "train"),
      heldout=str(data / "heldout"),
      heldout_rows=_HELDOUT_ROWS.value,
      sequence_length=load_info(data / "train").sequence_length,
    ),
    batch_size=_BATCH_SIZE.value,
    num_steps=_NUM_STEPS.value,
    dtype=_DTYPE.value,
    remat=_REMAT.value,
    optimizer=OptimizerConfig(warmup_steps=10),
    log_every=5,
    evaluate_every=max(_NUM_STEPS.value // 6, 1),
    save_every=max(_NUM_STEPS.value // 6, 1),
    keep_checkpoints=1,
  )
  teacher = supra_jax.load(_TEACHER.value)
  teacher_nll = heldout_nll(
    teacher.model,
    teacher.params,
    data / "heldout",
    batch_size=config.rows_a_microbatch,
    max_rows=config.data.heldout_rows,
  )
  del teacher
  found: dict[str, list[dict[str, Any]]] = {}
  for seed in seeds:
    for name in names:
      found.setdefault(name, []).append(one_run(name, seed, config, workdir))
      print(f"{name}, seed {seed}: {found[name][-1]['points'][-1][2]:.3f}", flush=True)
  recipe = {name: getattr(config, name) for name in ("batch_size", "num_steps", "tokens_a_step", "dtype")}
  recipe["rate_scale"] = _RATE_SCALE.value
  result = described() | {"teacher_nll": teacher_nll, "recipe": recipe, "methods": found}
  output = Path(_OUTPUT.value)
  output.with_suffix(".json").write_text(to_json(result, indent=1) + "\n")
  curves = {name: [[(p[0], p[2]) for p in r["points"]] for r in runs] for name, runs in found.items()}
  slow = "random" if "random" in curves else ""
  plot_curves(curves, output.with_suffix(".png"), teacher_nll=teacher_nll, tenth_of=slow)
  timed = {name: by_seconds(runs) for name, runs in found.items()}
  seconds_png = output.with_name(f"{output.name}_seconds.png")
  plot_curves(timed, seconds_png, teacher_nll=teacher_nll, x="seconds of calibration and training")
  print(f"Teacher: {teacher_nll:.3f}\n{table(found)}")
  if slow:
    print(in_a_tenth(found, slow))


if __name__ == "__main__":
  _TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer.", required=True)
  _DATA = flags.DEFINE_string("data", None, "Packed text, with its parts train and heldout.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs; a benchmark resumes.", required=True)
  _METHODS = flags.DEFINE_list("methods", ["random", "calibrated_32k"], f"Methods to run, of {', '.join(METHODS)}.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of phi and of the order of the text.")
  _NUM_STEPS = flags.DEFINE_integer("num_steps", 60, "Steps of a run of the full length.", lower_bound=1)
  _RATE_SCALE = flags.DEFINE_float(
    "rate_scale", 1.0, "Multiplier of the peak learning rates, which were chosen for SmolLM2."
  )
  _BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Rows of a batch.", lower_bound=1)
  _REMAT = flags.DEFINE_enum("remat", "none", ["none", "block"], "What the backward pass recomputes.")
  _HELDOUT_ROWS = flags.DEFINE_integer("heldout_rows", 24, "Held-out rows to evaluate on.", lower_bound=1)
  _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/tokens_to_quality", "JSON and plots to write, no suffix.")
  run(main)
