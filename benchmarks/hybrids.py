"""Measures hybrids before any training: kept softmax layers, or a softmax window beside linear attention.

    python -m benchmarks.hybrids --teacher=DIR --data=DIR --workdir=DIR [--calibration_tokens=8192]

Reports held-out loss, size of the state and speed of decoding. `--data` is a directory that
`supra_jax.bin.prepare_data` packed, with held-out text. Each model is linearised once; a killed benchmark resumes.
Prints a table and writes JSON.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

import supra_jax
from benchmarks.machine import described
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.core.sharding import least_tokens
from supra_jax.data.loading import heldout_batches
from supra_jax.inference.engine import generate_tokens
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Calibrated, Start, Window
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import state_bytes
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig, mixer_class
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.heldout import mean_nll
from supra_jax.storage.model_directory import load_model_without_params

KEPT = 4  # number of softmax layers that stay
DECODED, ROUNDS = 64, 3  # tokens decoded in a round, and timed rounds
# Name of a model -> (start, config of the mixer; None: the start's own).
MODELS: dict[str, tuple[Start, MixerConfig | None]] = {
  "supra": (Calibrated(), None),
  f"{KEPT} softmax layers, evenly spaced": (Calibrated(), None),
  f"{KEPT} softmax layers, by KL": (Calibrated(keep_softmax=KEPT), None),
  "window of 16": (Window(window=16), None),
  "window of 64": (Window(), None),
  "window of 256": (Window(window=256), None),
  "window of 64, one sink": (Window(sinks=1), None),
  "window of 64, no sinks": (Window(sinks=0), None),
  "window of 64, calibrated": (Calibrated(), WindowConfig()),
  "window of 64, no sinks, calibrated": (Calibrated(), WindowConfig(sinks=0)),
}


def measure(lm: supra_jax.LM, heldout: Path) -> dict[str, Any]:
  """Measures held-out loss in nats per token and bytes of state.

  The result has the model's config too, so that `main` can time the decoding of all models right after one another.
  """
  batches = heldout_batches(heldout, batch_size=2, max_rows=_HELDOUT_ROWS.value)
  nll = mean_nll(lm.model, lm.params, batches)
  state = {str(length): state_bytes(lm.config, length) for length in (2048, 32768)}
  softmax = [i for i, mixer in enumerate(lm.config.mixers) if mixer_class(mixer).GROWS]
  return {"nll": nll, "state_bytes": state, "softmax_layers": softmax, "config": json.loads(lm.config.to_json())}


def decoding_speed(config: ModelConfig) -> float:
  """Tokens per second of decoding one sequence with random weights, the best of ROUNDS."""
  model, seconds = Transformer(config), []
  params = model.init(jax.random.key(0), least_tokens(), method="logits")["params"]
  for _ in range(1 + ROUNDS):  # the first compiles
    began = time.monotonic()
    assert len(list(generate_tokens(model, params, [1, 2, 3], max_new_tokens=DECODED))) == DECODED
    seconds.append(time.monotonic() - began)
  return DECODED / min(seconds[1:])


def one(name: str, start: Start, mixer: MixerConfig | None, workdir: Path) -> dict[str, Any]:
  """Linearises and measures a model of MODELS, unless an earlier call did."""
  directory = workdir / name.replace(" ", "_").replace(",", "")
  done = directory.with_suffix(".json")
  if done.exists():
    return json.loads(done.read_text())
  layers = None
  if isinstance(start, Calibrated):
    start = dataclasses.replace(start, data=f"{_DATA.value}/train", tokens=_TOKENS.value)
  if name.endswith("evenly spaced"):
    count = load_model_without_params(_TEACHER.value).config.num_layers
    stay = [round((i + 0.5) * count / KEPT - 0.5) for i in range(KEPT)]
    layers = [i for i in range(count) if i not in stay]
  shutil.rmtree(directory, ignore_errors=True)
  with shown() as progress:
    linearize_checkpoint(_TEACHER.value, directory, start, mixer=mixer, layers=layers, progress=progress)
  found = measure(supra_jax.load(directory), Path(_DATA.value) / "heldout")
  done.write_text(to_json(found))
  shutil.rmtree(directory)
  return found


def table(found: dict[str, dict[str, Any]]) -> str:
  """Formats the results of all models as a Markdown table."""
  lines = [
    "| model | nats a token | state at 2k and 32k tokens, MiB | tokens/s decoding |",
    "| --- | --- | --- | --- |",
  ]
  for name, model in found.items():
    state = " and ".join(f"{size / 2**20:,.1f}" for size in model["state_bytes"].values())
    lines.append(f"| {name} | {model['nll']:.2f} | {state} | {model['tokens_per_second']:.0f} |")
  return "\n".join(lines)


def main() -> None:
  workdir = Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  found = {"teacher": measure(supra_jax.load(_TEACHER.value), Path(_DATA.value) / "heldout")}
  for name in _MODELS.value or MODELS:
    found[name] = one(name, *MODELS[name], workdir)
    print(f"{name}: {found[name]['nll']:.3f}", flush=True)
  for model in found.values():
    model["tokens_per_second"] = decoding_speed(ModelConfig.from_json(to_json(model.pop("config"))))
  recipe = {"calibration_tokens": _TOKENS.value, "heldout_rows": _HELDOUT_ROWS.value}
  Path(_OUTPUT.value).write_text(to_json(described() | recipe | {"models": found}, indent=1) + "\n")
  print(table(found))


if __name__ == "__main__":
  _TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer.", required=True)
  _DATA = flags.DEFINE_string("data", None, "Packed text, with its parts train and heldout.", required=True)
  _WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of models and results; a benchmark resumes.", required=True
  )
  _MODELS = flags.DEFINE_multi_enum("model", [], list(MODELS), "Model to measure; repeatable. Default: all.")
  _TOKENS = flags.DEFINE_integer("calibration_tokens", 8192, "Tokens to calibrate on.", lower_bound=1)
  _HELDOUT_ROWS = flags.DEFINE_integer("heldout_rows", 12, "Held-out rows to evaluate on.", lower_bound=1)
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/hybrids.json", "JSON file to write.")
  run(main)
