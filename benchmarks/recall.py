"""Measures what linearised models remember, beside their teacher and beside windows of softmax of equal bytes.

    python -m benchmarks.recall --teacher=DIR --input=GLOB --workdir=DIR [--checkpoint=trained=DIR]

Models are linearised from the teacher in the work directory, or named by `--checkpoint`. A cell is what one model, or
one window of the teacher, has on the long documents, or on the planted texts of a kind at a distance. Each cell is
written to the work directory as soon as it is there, in order of worth, and a killed benchmark resumes. Models that are
compared with the same window share its cells. Prints a report for each model; writes JSON and a plot.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import supra_jax
from benchmarks.machine import described as machine
from kernels_pallas.verdict import slug
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.data.planted import KINDS
from supra_jax.data.text import read_documents
from supra_jax.evaluation import ablation, by_distance, memory_loss, recall
from supra_jax.evaluation.readers import EQUAL, MODEL, OWN, TEACHER, Reader, described, last_tokens, readers
from supra_jax.evaluation.recall_tables import as_markdown
from supra_jax.linearization.calibrate import shown
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Calibrated, Start, Window
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig

# Name of a model -> (start, config of the mixer; None: the start's own). `transformer` is the teacher itself.
MODELS: dict[str, tuple[Start, MixerConfig | None]] = {
  "window of 64": (Window(), None),
  "window of 64, calibrated": (Calibrated(), WindowConfig()),
  "window of 256": (Window(window=256), None),
  "supra, calibrated": (Calibrated(), None),
}
TRANSFORMER = "transformer"


def models(workdir: Path) -> dict[str, supra_jax.LM]:
  """Loads the models, and makes those that are not there yet; the transformer comes last."""
  found = {}
  for name in _MODELS.value or [*MODELS, TRANSFORMER]:
    directory = workdir / slug(name)
    if name != TRANSFORMER and not (directory / "config.json").exists():
      start, mixer = MODELS[name]
      with shown() as progress:
        linearize_checkpoint(_TEACHER.value, directory, start, mixer=mixer, progress=progress)
    found[name] = supra_jax.load(_TEACHER.value if name == TRANSFORMER else directory)
  for text in _CHECKPOINTS.value:
    name, _, directory = text.partition("=")
    found[name] = supra_jax.load(directory)
  return found


def key(name: str, role: str, reader: Reader) -> str:
  """Returns the name of a model's cells on disk: those of a window are the same for all models."""
  if role in (EQUAL, OWN):
    told = sorted({(layer.window, layer.sinks) for layer in reader.config.layers if isinstance(layer, WindowConfig)})
    softmax = reader.config.mixers.count("softmax")
    return "-".join([*(f"window_{window}_{sinks}" for window, sinks in told), *[f"softmax_{softmax}"] * bool(softmax)])
  return TEACHER if role == TEACHER or name == TRANSFORMER else slug(name)


class Cells:
  """What was measured: arrays and JSON in the work directory, by name."""

  def __init__(self, workdir: Path):
    self._directory = workdir / "cells"
    self._directory.mkdir(exist_ok=True)

  def of(self, name: str, measure: Callable[[], Any]) -> Any:
    """Returns a cell; measures it if it is not there."""
    path = self._directory / f"{name}.json"
    if not path.exists():
      began = time.monotonic()
      text = to_json(measure())
      path.with_suffix(".partial").write_text(text)
      path.with_suffix(".partial").rename(path)
      print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(path.read_text())


def report(name: str, roles: dict[str, Reader], rows: np.ndarray, planted: dict, cells: Cells, upto: int) -> dict:
  """Returns a report of a model as `recall.report` does, with the first `upto` of losses, parts and each distance."""
  how: dict[str, Any] = {"batch_size": _BATCH.value}
  windows = {role: last_tokens(roles[role]) for role in (EQUAL, OWN) if role in roles}
  losses = {
    role: np.array(
      cells.of(f"losses-{key(name, role, reader)}", lambda r=reader: rounded_losses(r, rows, _BATCH.value)), np.float32
    )
    for role, reader in roles.items()
  }
  found: dict[str, Any] = {
    "models": {role: described(reader, rows.shape[1]) for role, reader in roles.items()},
    "loss": memory_loss.summary(rows, losses, windows),
    "parts": {},
    "recall": {},
  }
  if upto > 0:
    own = roles[MODEL]
    found["parts"] = cells.of(f"parts-{key(name, MODEL, own)}", lambda: ablation.ablate(own, rows, **how))
  distances = sorted({distance for of in planted.values() for distance in of})
  for distance, kind in itertools.product(distances[: max(upto - 1, 0)], planted):
    texts, at = planted[kind][distance], {}
    for role, reader in roles.items():
      cell = f"{kind}-{distance}-{key(name, role, reader)}"
      ranks = cells.of(cell, lambda r=reader, t=texts: by_distance.ranks(r, t, **how).tolist())
      at[role] = by_distance.summary(np.array(ranks), len(texts[0].candidates))
    line = {"distance": distance, "models": at} | by_distance.marks(roles, at, distance)
    found["recall"].setdefault(kind, []).append(line)
  return found


def rounded_losses(reader: Reader, rows: np.ndarray, batch_size: int) -> list[list[float]]:
  """Returns the losses of one model, rounded to what a plot or a mean of thousands can show."""
  return memory_loss.read_losses({MODEL: reader}, rows, batch_size=batch_size)[MODEL].round(5).tolist()


def keep_recipe(workdir: Path, names: Sequence[str]) -> dict[str, Any]:
  """Returns {name: value} of the flags that cells depend on, and keeps them in the work directory, which it makes.

  Raises:
    ValueError: the directory's cells are of other values.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  recipe = {name: flags.FLAGS[name].value for name in names}
  kept = workdir / "recipe.json"
  if kept.exists() and json.loads(kept.read_text()) != recipe:
    raise ValueError(f"{kept} is of another recipe, {kept.read_text()}: choose another --workdir.")
  kept.write_text(to_json(recipe))
  return recipe


def plot(reports: dict[str, dict[str, Any]], path: Path) -> None:
  """Draws the loss on repeats, and the recall over all kinds, against the distance."""
  figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  for label, style, repeats, recalled in _curves(reports):
    left.plot(*zip(*repeats, strict=True), style, marker="o", markersize=3, label=label)
    if recalled:
      right.plot(*zip(*recalled, strict=True), style, marker="o", markersize=3, label=label)
  left.set_title("loss on the last token of a repeat, nats", loc="left", fontsize=10)
  left.set_xlabel("tokens since its latest occurrence, at least")
  right.set_title("share of planted facts recalled", loc="left", fontsize=10)
  right.set_xlabel("tokens since the fact")
  right.set_ylim(0, 1.02)
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.spines[["top", "right"]].set_visible(False)
  figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
  figure.savefig(path)


def _curves(reports: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, list, list]]:
  first, drawn = True, set()
  for name, found in reports.items():
    for role in [MODEL, EQUAL, *([TEACHER] if first and TRANSFORMER not in reports else [])]:
      if role in found["models"] and not (name == TRANSFORMER and role != MODEL):
        repeats = [(line["from"], line["loss"][role]) for line in found["loss"]["by_repeat"]]
        shares: dict[int, list[float]] = {}
        for line in itertools.chain.from_iterable(found["recall"].values()):
          shares.setdefault(line["distance"], []).append(line["models"][role]["right"])
        window = found["loss"]["against"].get(role, {}).get("window")
        label = {MODEL: name, TEACHER: TEACHER, EQUAL: f"window of as many bytes, {window} tokens"}[role]
        if label in drawn:
          continue
        drawn.add(label)
        style = "--" if role == EQUAL else "-"
        yield label, style, repeats, [(distance, float(np.mean(x))) for distance, x in sorted(shares.items())]
    first = False


def main() -> None:
  workdir = Path(_WORKDIR.value)
  names = ("teacher", "input", "length", "documents", "distances", "kind", "items", "state_dtype")
  recipe = keep_recipe(workdir, names)

  teacher, lms, cells = supra_jax.load(_TEACHER.value), models(workdir), Cells(workdir)
  documents = map(teacher.tokenizer.encode, read_documents(_INPUT.value, _TEXT_KEY.value))
  rows, filler = recall.long_rows(documents, _LENGTH.value, _DOCUMENTS.value)
  distances = [int(text) for text in _DISTANCES.value]
  planted = recall.texts(teacher, filler, distances, _KINDS.value, count=_ITEMS.value)
  roles = {name: readers(lm, teacher, _LENGTH.value, state_dtype=_STATE.value) for name, lm in lms.items()}
  for upto in range(len(distances) + 2):
    reports = {name: report(name, made, rows, planted, cells, upto) for name, made in roles.items()}
    output = Path(_OUTPUT.value)
    output.write_text(to_json(machine() | recipe | {"reports": reports}, indent=1) + "\n")
    plot(reports, output.with_suffix(".png"))
    jax.clear_caches()  # the texts of the next distance have programs of their own
  for name, found in reports.items():
    print(f"\n# {name}\n{as_markdown(found)}")


if __name__ == "__main__":
  _TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer.", required=True)
  _INPUT = flags.DEFINE_string("input", "pydoc:topics", "Long documents, as supra_jax.bin.recall takes them.")
  _TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of models and cells; a benchmark resumes.", required=True)
  _MODELS = flags.DEFINE_multi_enum("model", [], [*MODELS, TRANSFORMER], "Model to measure; repeatable. Default: all.")
  _CHECKPOINTS = flags.DEFINE_multi_string("checkpoint", [], "A further model, NAME=DIR; repeatable.")
  _LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a document.", lower_bound=2)
  _DOCUMENTS = flags.DEFINE_integer("documents", 12, "Documents to read.", lower_bound=2)
  _DISTANCES = flags.DEFINE_list("distances", ["128", "512", "1024", "2048", "4096"], "Distances of planted facts.")
  _KINDS = flags.DEFINE_multi_enum("kind", list(KINDS), KINDS, "Kind of planted facts; repeatable.")
  _ITEMS = flags.DEFINE_integer("items", 8, "Planted texts of each kind and distance.", lower_bound=2)
  _BATCH = flags.DEFINE_integer("batch_size", 2, "Documents or texts that are read at a time.", lower_bound=1)
  _STATE = flags.DEFINE_string("state_dtype", "bfloat16", "Dtype in which states hold keys and values.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/recall.json", "JSON file to write, and a plot beside it.")
  run(main)
