"""Measures what a memory saves over windows of softmax of equal bytes, on long documents: no training.

    python -m benchmarks.memory --teacher=DIR --input=GLOB --workdir=DIR

A cell is what one model loses on all documents, token by token. Each is written to the work directory as soon as it is
there, in order of worth, and a killed benchmark resumes. The sizes of heads are allotted from documents that are not
measured on; `topics` allots them from Python's documentation, the default of `linearize`. Prints a table; writes JSON
and a plot.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import supra_jax
from benchmarks.machine import described as machine
from benchmarks.recall import Cells, keep_recipe, rounded_losses
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.core.sharding import make_mesh
from supra_jax.data.text import read_documents
from supra_jax.evaluation import memory_loss, recall
from supra_jax.evaluation.readers import TEACHER, Reader, reader, window_only
from supra_jax.inference.lm import LM
from supra_jax.linearization.budget import remembered, with_memories, within
from supra_jax.linearization.calibration_text import read_batches
from supra_jax.linearization.starts import Memory
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.supra_window import WindowConfig

SINKS = 4
# Name -> changes of the start `Memory`, and of what it makes; in order of worth.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "memory": ({}, {}),
  "random": ({}, {"score": "random"}),
  "text alone": ({"recall_weight": 0.0}, {}),
  "topics": ({"data": Memory.data}, {}),
  "8 patterns": ({"patterns": 8}, {}),
}
DTYPE = "bfloat16"


def made(teacher: LM, way: str, tokens: int, rows: np.ndarray, cells: Cells) -> Reader:
  """Returns the memory of a size that a way makes; `rows` are those to allot from."""
  changes, changed = WAYS[way]
  start = Memory(state_tokens=tokens, **changes)
  chosen = range(teacher.config.num_layers)
  mesh = make_mesh(devices=jax.devices()[:1])

  def sizes() -> dict[str, Any]:
    with jax.set_mesh(mesh):
      own = [{"tokens": row[None]} for row in rows]
      topics = "data" in changes
      batches = read_batches(start, teacher.tokenizer, teacher.config.vocab_size, mesh) if topics else own
      return remembered((teacher.params, teacher.config), start, batches, mesh, chosen)[2]

  found = cells.of(f"sizes-{'-'.join(map(str, ['memory', *changes.items()]))}-{tokens}", sizes)
  common = dataclasses.replace(within(start, teacher.config, chosen)[0], **changed)
  params, config = with_memories((teacher.params, teacher.config), common, found["retained"], found["order"], chosen)
  return reader(LM(config, params, teacher.tokenizer), DTYPE)


def one_size(teacher: LM, tokens: int) -> Reader:
  """Returns the memory whose heads all retain the same number of tokens."""
  common, retained = within(Memory(state_tokens=tokens), teacher.config, range(teacher.config.num_layers))
  layer: MemoryConfig = dataclasses.replace(common, retained=(int(retained),))
  config = teacher.config.replace(layers=(layer,) * teacher.config.num_layers)
  return reader(LM(config, teacher.params, teacher.tokenizer), DTYPE)


def plot(found: dict[int, dict[str, Any]], path: Path) -> None:
  """Draws loss against bytes, and what the largest size saves by position."""
  figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  ways = list(dict.fromkeys(way for at in found.values() for way in at["bytes"]))
  for way in ways:
    points = sorted(
      (at["bytes"][way] / 1e6, at["loss"]["all"]["loss"][way]) for at in found.values() if way in at["bytes"]
    )
    left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way)
  any_size = next(iter(found.values()))
  left.axhline(any_size["loss"]["all"]["loss"][TEACHER], color="black", linewidth=0.8, linestyle=":", label=TEACHER)
  left.set_title("loss, nats a token", loc="left", fontsize=10)
  left.set_xlabel("MB of state at any length")
  for tokens, at in found.items():
    if "memory" in at["bytes"]:
      lines = at["loss"]["by_position"]
      saved = [line["loss"]["window"] - line["loss"]["memory"] for line in lines]
      right.plot([line["from"] for line in lines], saved, marker="o", markersize=3, label=f"{tokens} tokens a head")
  right.axhline(0, color="black", linewidth=0.8)
  right.set_xscale("log", base=2)
  right.set_title("nats a token less than the window of equal bytes", loc="left", fontsize=10)
  right.set_xlabel("position in the document, from")
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
  figure.savefig(path)


def table(found: dict[int, dict[str, Any]]) -> str:
  """Returns a Markdown table of losses, and of what each saves over the window of equal bytes."""
  lines = ["| tokens a head | model | bytes | loss | less than the window, 95 % | on far repeats | elsewhere |"]
  lines.append("| --- | --- | --- | --- | --- | --- | --- |")
  for tokens, at in found.items():
    for way, size in at["bytes"].items():
      row = [f"{tokens}", way, f"{size:,}", f"{at['loss']['all']['loss'][way]:.4f}"]
      for part in ("all_tokens", "far_repeats", "elsewhere"):
        saved = at[part]["saved"].get(way)
        row.append("" if saved is None else "{:.4f} ({:.4f} to {:.4f})".format(saved["value"], *saved["interval"]))
      lines.append(f"| {' | '.join(row)} |")
  return "\n".join(lines)


def main() -> None:
  workdir = Path(_WORKDIR.value)
  recipe = keep_recipe(workdir, ("teacher", "input", "length", "documents"))

  teacher, cells = supra_jax.load(_TEACHER.value), Cells(workdir)
  documents = map(teacher.tokenizer.encode, read_documents(_INPUT.value, _TEXT_KEY.value))
  every, _ = recall.long_rows(documents, _LENGTH.value + 1, _DOCUMENTS.value + _ALLOT.value)
  rows, apart = every[: _DOCUMENTS.value, : _LENGTH.value], every[_DOCUMENTS.value :]
  theirs = reader(teacher, DTYPE)

  def losses(name: str, model: Reader) -> np.ndarray:
    jax.clear_caches()
    return np.array(cells.of(f"losses-{name}", lambda: rounded_losses(model, rows, _BATCH.value)), np.float32)

  found: dict[int, dict[str, Any]] = {}
  back = np.stack([memory_loss.repeat_distances(row) for row in rows])[:, 1:]
  own = losses(TEACHER, theirs)
  for text in _TOKENS.value:
    tokens = int(text)
    window = window_only(theirs, (WindowConfig(window=tokens - SINKS, sinks=SINKS),) * teacher.config.num_layers)
    models = {"window": window, **{way: made(teacher, way, tokens, apart, cells) for way in _WAYS.value}}
    if _ONE_SIZE.value:
      models["one size"] = one_size(teacher, tokens)
    read = {TEACHER: own} | {way: losses(f"{way}-{tokens}", model) for way, model in models.items()}
    found[tokens] = {
      "bytes": {way: model.bytes(_LENGTH.value) for way, model in models.items()},
      "loss": memory_loss.summary(rows, read, {"window": tokens}),
      "all_tokens": memory_loss.compared(read, "window", np.ones(back.shape, bool)),
      "far_repeats": memory_loss.compared(read, "window", back > tokens),
      "elsewhere": memory_loss.compared(read, "window", back <= tokens),
    }
    output = Path(_OUTPUT.value or workdir / "memory.json")
    output.write_text(to_json(machine() | recipe | {"sizes": found}, indent=1) + "\n")
    plot(found, output.with_suffix(".png"))
  print(table(found))


if __name__ == "__main__":
  _TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer.", required=True)
  _INPUT = flags.DEFINE_string("input", "pydoc:topics", "Long documents, as supra_jax.bin.recall takes them.")
  _TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of cells; a benchmark resumes.", required=True)
  _TOKENS = flags.DEFINE_list("tokens", ["132", "260", "68"], "Sizes of the state, in tokens of a key/value head.")
  _WAYS = flags.DEFINE_multi_enum("way", ["memory"], list(WAYS), "Memory to measure; repeatable.")
  _ONE_SIZE = flags.DEFINE_bool("one_size", False, "Measure the memory with one size for all heads too.")
  _LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a document.", lower_bound=2)
  _DOCUMENTS = flags.DEFINE_integer("documents", 40, "Documents to measure on.", lower_bound=2)
  _ALLOT = flags.DEFINE_integer(
    "allot_documents", 3, "Further documents, from which sizes are allotted.", lower_bound=1
  )
  _BATCH = flags.DEFINE_integer("batch_size", 4, "Documents that are read at a time.", lower_bound=1)
  _OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write, a plot beside it. Default: memory.json in workdir."
  )
  run(main)
