"""The directory of a run: claims it for one config, writes the trained model, and sums up the metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kernels_pallas import verdict
from supra_jax.core import bucket
from supra_jax.core.distributed import together
from supra_jax.core.files import AnyPath, remove_directory
from supra_jax.core.plain_json import to_json
from supra_jax.core.run_record import write_run_record
from supra_jax.model.config import ModelConfig
from supra_jax.storage.model_directory import CONFIG_FILE as MODEL_CONFIG_FILE
from supra_jax.storage.model_directory import ModelCheckpoint, save_model
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import read_metrics
from supra_jax.training.optimizer import make_schedule

METRICS_FILE, PICTURE_FILE, CONFIG_FILE = "metrics.jsonl", "loss.png", "train_config.json"
KERNELS_FILE = "kernels.json"
MODEL_DIRECTORY, STATES_DIRECTORY, DATA_DIRECTORY = "checkpoint", "training", "data"
# Options that may differ when a run resumes: they change neither the data nor, except by rounding, the result.
MAY_CHANGE_ON_RESUME = (
  "log_every",
  "evaluate_every",
  "save_every",
  "keep_checkpoints",
  "max_skipped",
  "mesh",
  "microbatches",
  "remat",
)


@dataclasses.dataclass(frozen=True)
class TrainSummary:
  """The result of a run.

  Attributes:
    nll_before, nll_after: held-out loss before the first and after the last step, in nats per token.
    tokens_trained: number of tokens trained on.
    tokens_per_second: speed of the training steps, over all devices: median over the records; NaN if none has a speed.
    text: the same in words.
  """

  nll_before: float
  nll_after: float
  tokens_trained: int
  tokens_per_second: float

  @property
  def text(self) -> str:
    return (
      f"Held-out loss {self.nll_before:.4f} -> {self.nll_after:.4f} nats a token, {self.tokens_trained} tokens, "
      f"{self.tokens_per_second:.0f} tokens/s."
    )


def claim(
  workdir: AnyPath, config: TrainConfig, model: ModelConfig, files: bucket.Copies, *, extend: bool = False
) -> int:
  """Writes the configs of the run and of its model into the workdir, unless the workdir belongs to another run.

  Options of MAY_CHANGE_ON_RESUME may differ from the configs that are there. If the earlier run stopped before it wrote
  metrics, any option may differ; if one outside MAY_CHANGE_ON_RESUME does, the rows that the earlier run packed are
  removed. Also appends to `runs.jsonl`. All processes call it.

  Args:
    workdir: directory of the run.
    config: the run's config.
    model: config of the model that the run starts from.
    files: local copies of the files that grow during a run.
    extend: whether the run there may have fewer steps.

  Returns:
    The number of steps that the run there had, or that this one has if there is none.

  Raises:
    ValueError: the workdir belongs to a run with another config or model; the message names each option that differs.
      Or `extend` is set, and the run there has more steps, or no saved state.
  """
  path, steps = workdir / CONFIG_FILE, config.num_steps
  values = _described(config, model)
  if path.exists():
    stored = json.loads(path.read_text())
    stored_model = ModelConfig.from_json(to_json(stored.pop("model")))
    # The stored config is parsed and written again, so that options added since then have their defaults in it.
    earlier = TrainConfig.from_mapping(stored)
    before, now = _flat(_described(earlier, stored_model)), _flat(values)
    steps = earlier.num_steps
    if extend and steps > config.num_steps:
      raise ValueError(f"--extend: {workdir} belongs to a run of {steps} steps: wanted --config.num_steps above that.")
    if extend and not list((workdir / STATES_DIRECTORY).glob("[0-9]*")):
      raise ValueError(
        f"--extend: {workdir} has no saved state to go on from (--config.save_every=0 keeps none). To train its model "
        f"further, in another workdir: --config.init_checkpoint={workdir / MODEL_DIRECTORY}."
      )
    free = {*MAY_CHANGE_ON_RESUME, *["num_steps"] * extend}
    differ = [
      f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
      for name in sorted(before.keys() | now.keys())
      if before.get(name) != now.get(name) and name not in free
    ]
    if differ and (workdir / METRICS_FILE).exists():
      trained = workdir / MODEL_DIRECTORY
      further = f" To train its model further, there: --config.init_checkpoint={trained}." if trained.exists() else ""
      if steps < config.num_steps and all(line.startswith("num_steps: ") for line in differ):
        further += " Or --extend goes on here, with the learning rates of the longer run."
      raise ValueError(
        f"{workdir} belongs to a run with another config or model; choose another workdir.{further} "
        + "; ".join(differ)
      )
    if differ and jax.process_index() == 0:
      # The earlier run stopped before its first record (bad input, say); its packed rows do not fit this config.
      for leftover in (DATA_DIRECTORY, f"{DATA_DIRECTORY}.partial"):
        remove_directory(workdir / leftover)
  together("config read")
  if jax.process_index() == 0:
    path.write_text(to_json(values, indent=2) + "\n")
    write_run_record(files.directory, values)
    files.copy()
  together("config written")
  return steps


def extension(config: TrainConfig, steps_before: int, first: int) -> str:
  """Returns what to say of a run that goes on with more steps than it had; "" if it has as many.

  Args:
    config: the run's config.
    steps_before: number of steps that the run had.
    first: number of steps that the saved state has behind it.
  """
  if steps_before == config.num_steps:
    return ""
  before, now = (
    float(make_schedule(config.optimizer, steps)(first if steps > first else first - 1))
    for steps in (steps_before, config.num_steps)
  )
  return f" It had {steps_before} steps; the learning rate, which was {before:.3g} there, is {now:.3g}."


def kernels_of_run(workdir: AnyPath) -> verdict.Choices | str:
  """Returns what "auto" means in a run, the same to all processes, and writes it into the workdir at the first start.

  A run keeps to the kernels that it began with on a kind of device (`KERNELS_FILE`), whatever verdicts say later. What
  `verdict.using` names has priority, as `--implementation` does.

  Args:
    workdir: directory of the run.

  Raises:
    ValueError: the file is damaged.
  """
  kind, _ = verdict.device()
  meaning = verdict.used()
  if jax.process_index() == 0:
    path = workdir / KERNELS_FILE
    kept: dict[str, Any] = {}
    try:
      if path.exists():
        kept = dict(json.loads(path.read_text()))
      before = verdict.parse(kept[kind]) if kind in kept else None
    except (ValueError, TypeError) as error:
      raise ValueError(f"{path}: {error}. Remove it to choose kernels anew.") from error
    if meaning is None:
      now = verdict.of_this_device()
      meaning = now if before is None else before
      if meaning != now:
        print(
          f"This run keeps to the kernels that it began with; doctor has others now. To take these, remove {path}.",
          file=sys.stderr,
        )
    if before is None:
      path.write_text(to_json(kept | {kind: verdict.to_json(meaning)}, indent=1) + "\n")
  return verdict.agreed(() if meaning is None else meaning)


def _described(config: TrainConfig, model: ModelConfig) -> dict[str, Any]:
  return {**dataclasses.asdict(config), "model": json.loads(model.to_json())}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def write_model(directory: AnyPath, start: ModelCheckpoint, params: Any, facts: Callable[[], dict[str, Any]]) -> None:
  """Writes the trained model, in place of a model that an earlier call wrote. All processes call it together.

  Args:
    directory: model directory to write.
    start: the model that the run started from; the trained model has the same config and tokenizer.
    params: the trained parameters, one subtree per layer.
    facts: returns JSON values about the run for source.json; called after the parameters are written.

  Raises:
    OSError: the directory cannot be written.
  """
  if jax.process_index() == 0:
    remove_directory(directory, first=MODEL_CONFIG_FILE)
  together("earlier export removed")
  save_model(
    directory,
    config=start.config,
    params=params,
    tokenizer_files=start.tokenizer_files,
    source=lambda: {"trained_from": start.source, **facts()},
  )


def outcome(metrics: AnyPath, tokens: int) -> dict[str, Any]:
  """Returns the result of a run for its model's source.json: tokens trained on, held-out loss before and after.

  Args:
    metrics: path of the run's METRICS_FILE.
    tokens: number of tokens trained on.
  """
  heldout = _heldout(read_metrics(metrics))
  return {"tokens_trained": tokens, "heldout_nll": {"before": heldout[0], "after": heldout[-1]}}


def summary(metrics: AnyPath, tokens: int) -> TrainSummary:
  """Reads the summary of a run from its metrics.

  Args:
    metrics: path of the run's METRICS_FILE.
    tokens: number of tokens trained on.

  Raises:
    ValueError: the first or the last held-out loss is not finite, or a line of the file is not a record.
  """
  records = read_metrics(metrics)
  heldout = _heldout(records)
  first, last = heldout[0], heldout[-1]
  speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
  if first is None or last is None:
    raise ValueError(f"{metrics.parent}: the held-out loss is not finite: the model there is of no use as it is.")
  return TrainSummary(
    nll_before=first,
    nll_after=last,
    tokens_trained=tokens,
    tokens_per_second=statistics.median(speeds) if speeds else math.nan,
  )


def _heldout(records: Sequence[Mapping[str, Any]]) -> list[float | None]:
  """Returns the held-out loss of each evaluation in nats per token; None for a loss that was not finite."""
  return [record["heldout_nll"] for record in records if "heldout_nll" in record]
