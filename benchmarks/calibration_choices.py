"""Ablates the choices in calibration: held-out loss of a calibrated model before any training.

    python -m benchmarks.calibration_choices --teacher=DIR --data=DIR --workdir=DIR [--choice=default --choice=bias]

`--data` is a directory that `supra_jax.bin.prepare_data` packed, with held-out text. A seed determines the order of its
rows and the draw of phi. A killed benchmark resumes. Prints a table and writes JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.machine import described
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.core.sharding import make_mesh
from supra_jax.data.loading import heldout_batches, make_loader, parse_sources
from supra_jax.data.packed import load_info
from supra_jax.linearization.calibrate import calibrate, shown
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.solve import RIDGE
from supra_jax.linearization.starts import Identity, Random
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.heldout import mean_nll
from supra_jax.storage.model_directory import ModelCheckpoint, load_model

ROWS = 4  # rows of a batch of calibration


@dataclasses.dataclass(frozen=True)
class Choice:
  """Settings of a calibration.

  Attributes:
    tokens: number of tokens to calibrate on, as a multiple of --calibration_tokens.
    ridge: ridge penalty, see `linearization.calibrate.calibrate`.
    mlp: whether to solve for the MLPs' last projections too.
    bias: whether to solve for a bias of attention's output projection too.
    random: whether phi is drawn at random; False: phi(x) = relu(x).
    mixer: config of the new mixer; None means that of the start.
  """

  tokens: float = 1.0
  ridge: float = RIDGE
  mlp: bool = True
  bias: bool = False
  random: bool = False
  mixer: MixerConfig | None = None


CHOICES = {
  "default": Choice(),
  "random phi": Choice(random=True),
  "random phi per head": Choice(random=True, mixer=SupraConfig(feature_map="per_head")),
  "bias": Choice(bias=True),
  "MLPs kept": Choice(mlp=False),
  "a quarter of the ridge": Choice(ridge=RIDGE / 4),
  "four times the ridge": Choice(ridge=RIDGE * 4),
  "a quarter of the tokens": Choice(tokens=0.25),
  "four times the tokens": Choice(tokens=4.0),
  "RetNet's decay": Choice(mixer=SupraConfig(decay="retnet")),
  "no decay": Choice(mixer=SupraConfig(decay="none")),
  "first slope 1": Choice(mixer=SupraConfig(decay_start=1.0)),
  "qk-norm": Choice(mixer=SupraConfig(qk_norm=True)),
  "window of 64": Choice(mixer=WindowConfig()),
}


def nll_of(choice: Choice, seed: int, teacher: ModelCheckpoint, data: Path) -> float:
  """Linearises and calibrates in memory, and returns the held-out loss in nats per token."""
  made = linearize(teacher.params, teacher.config, Random(seed) if choice.random else Identity(), mixer=choice.mixer)
  params, config = made.params, made.config
  if choice.bias:
    config = config.replace(output_bias=True)
    bias = jnp.zeros(config.hidden_size)
    for layer in (params[f"layers_{i}"] for i in range(config.num_layers)):
      layer["self_attn"]["o_proj"] = {**layer["self_attn"]["o_proj"], "bias": bias}
  length = load_info(data / "train").sequence_length
  count = max(round(_TOKENS.value * choice.tokens) // (ROWS * length), 1)
  loader = make_loader(parse_sources(str(data / "train")), batch_size=ROWS, seed=seed)
  batches = list(itertools.islice(loader, count))
  mesh = make_mesh("")
  with jax.set_mesh(mesh), shown() as report:
    student = (params, config)
    params = calibrate(
      (teacher.params, teacher.config), student, batches, mesh, ridge=choice.ridge, mlp=choice.mlp, report=report
    )
    return heldout_nll(params, config, data)


def heldout_nll(params: Mapping[str, Any], config: ModelConfig, data: Path) -> float:
  """Held-out loss of a model in nats per token."""
  heldout = heldout_batches(data / "heldout", batch_size=2, max_rows=_HELDOUT_ROWS.value)
  return mean_nll(Transformer(config), params, heldout)


def table(found: dict[str, dict[str, float]]) -> str:
  """Formats mean losses over seeds, and the range of differences from the default choice with the same seed."""
  lines = ["| choice | nats a token | beside the default | seeds |", "| --- | --- | --- | --- |"]
  for name, losses in found.items():
    apart = [nll - found["default"][seed] for seed, nll in losses.items() if seed in found.get("default", {})]
    beside = f"{min(apart):+.2f} to {max(apart):+.2f}" if apart and name != "default" else ""
    lines.append(f"| {name} | {statistics.fmean(losses.values()):.2f} | {beside} | {len(losses)} |")
  return "\n".join(lines)


def main() -> None:
  workdir, data = Path(_WORKDIR.value), Path(_DATA.value)
  workdir.mkdir(parents=True, exist_ok=True)
  names, seeds = _CHOICES.value or list(CHOICES), [int(seed) for seed in _SEEDS.value]
  teacher = load_model(_TEACHER.value)
  found: dict[str, dict[str, float]] = {}
  for seed, name in itertools.product(seeds, names):
    done = workdir / f"{name.replace(' ', '_')}-{seed}.json"
    if not done.exists():
      done.write_text(to_json(nll_of(CHOICES[name], seed, teacher, data)))
      jax.clear_caches()
    found.setdefault(name, {})[str(seed)] = json.loads(done.read_text())
    print(f"{name}, seed {seed}: {found[name][str(seed)]:.3f}", flush=True)
  result: dict[str, Any] = described() | {
    "calibration_tokens": _TOKENS.value,
    "heldout_rows": _HELDOUT_ROWS.value,
    "teacher_nll": heldout_nll(teacher.params, teacher.config, data),
    "choices": found,
  }
  Path(_OUTPUT.value).write_text(to_json(result, indent=1) + "\n")
  print(f"Teacher: {result['teacher_nll']:.3f}\n{table(found)}")


if __name__ == "__main__":
  _TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer.", required=True)
  _DATA = flags.DEFINE_string("data", None, "Packed text, with its parts train and heldout.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of results; a benchmark resumes.", required=True)
  _CHOICES = flags.DEFINE_multi_enum("choice", [], list(CHOICES), "Choice to measure; repeatable. Default: all.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the order of the text's rows and of phi.")
  _TOKENS = flags.DEFINE_integer("calibration_tokens", 8192, "Tokens that the default choice reads.", lower_bound=1)
  _HELDOUT_ROWS = flags.DEFINE_integer("heldout_rows", 12, "Held-out rows to evaluate on.", lower_bound=1)
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/calibration_choices.json", "JSON file to write.")
  run(main)
