"""The directory of a run: which config it belongs to, the model that it leaves, and what its metrics come to."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

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

METRICS_FILE, PICTURE_FILE, CONFIG_FILE = "metrics.jsonl", "loss.png", "train_config.json"
MODEL_DIRECTORY, STATES_DIRECTORY, DATA_DIRECTORY = "checkpoint", "training", "data"
# Options that change neither the data nor, but for rounding, the mathematics.
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
  """What came of a run: held-out nats a token before and after, tokens seen, and tokens a second of a step."""

  nll_before: float
  nll_after: float
  tokens_trained: int
  tokens_per_second: float


def claim(workdir: AnyPath, config: TrainConfig, model: ModelConfig, files: bucket.Copies) -> None:
  """Writes the configs of run and model into a new workdir, or compares them with those that are there.

  Args:
    workdir: directory of the run.
    config: the run's config.
    model: config of the model that it starts from.
    files: this machine's copy of the files that a run adds lines to.

  Raises:
    ValueError: the workdir belongs to a run with another config or model; names each option that differs.
  """
  path = workdir / CONFIG_FILE
  values = _described(config, model)
  if path.exists():
    stored = json.loads(path.read_text())
    stored_model = ModelConfig.from_json(to_json(stored.pop("model")))
    # Read and written again, so that an option that is newer than the run has its default.
    before, now = _flat(_described(TrainConfig.from_mapping(stored), stored_model)), _flat(values)
    differ = [
      f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
      for name in sorted(before.keys() | now.keys())
      if before.get(name) != now.get(name) and name not in MAY_CHANGE_ON_RESUME
    ]
    if differ and (workdir / METRICS_FILE).exists():
      trained = workdir / MODEL_DIRECTORY
      further = f" To train its model further, there: --config.init_checkpoint={trained}." if trained.exists() else ""
      raise ValueError(
        f"{workdir} belongs to a run with another config or model; choose another workdir.{further} "
        + "; ".join(differ)
      )
    if differ and jax.process_index() == 0:
      # The earlier run never began, for bad input perhaps; rows packed for it are of no use to this one.
      for leftover in (DATA_DIRECTORY, f"{DATA_DIRECTORY}.partial"):
        remove_directory(workdir / leftover)
  together("config read")
  if jax.process_index() == 0:
    path.write_text(to_json(values, indent=2) + "\n")
    write_run_record(files.directory, values)
    files.copy()
  together("config written")


def _described(config: TrainConfig, model: ModelConfig) -> dict[str, Any]:
  return {**dataclasses.asdict(config), "model": json.loads(model.to_json())}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def write_model(directory: AnyPath, start: ModelCheckpoint, params: Any, facts: Callable[[], dict[str, Any]]) -> None:
  """Writes the trained model; one that an earlier call wrote gives way.

  Args:
    directory: the model directory.
    start: the model that the run started from, whose config and tokenizer it keeps.
    params: the trained parameters, one subtree a layer.
    facts: returns what to tell of the run, for JSON.
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
  """What a run has come to, for those that its model is given to.

  Args:
    metrics: the run's METRICS_FILE.
    tokens: number of tokens trained on.
  """
  heldout = _heldout(read_metrics(metrics))
  return {"tokens_trained": tokens, "heldout_nll": {"before": heldout[0], "after": heldout[-1]}}


def summary(metrics: AnyPath, tokens: int) -> TrainSummary:
  """What came of a run.

  Args:
    metrics: the run's METRICS_FILE.
    tokens: number of tokens trained on.

  Raises:
    ValueError: the first or the last held-out loss is not finite.
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
  """Nats a token of each evaluation; None where it was not finite."""
  return [record["heldout_nll"] for record in records if "heldout_nll" in record]
