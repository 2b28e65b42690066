"""Times decoding and prefill: our RNNs, and transformers' own generate with softmax attention, of the same shape.

    python -m benchmarks.decode [--preset=smollm2_135m] [--batches=1,32] [--contexts=128,8192] [--prompts=512,8192]

Contestants:

- `supra`, `supra_window`, `memory`, `softmax`: a model whose layers all have this mixer, decoded as the engine decodes
  greedy texts, and prompts read in pieces, as the engine reads them. The memory has as many bytes as `supra_window`.
- `transformers`: LlamaForCausalLM in PyTorch, with scaled_dot_product_attention. Steps are those of `generate`, with
  its dynamic and its static cache (`generate` compiles the model for a static cache on a GPU only); prompts are read
  by `generate` or by a call of the model. The better of the two counts in each cell, and both are kept.

All compute in bfloat16 on a GPU, and in float32 on a CPU, with random weights and the same number of threads. Contexts
are filled in, not generated. A cell is a batch and a context, or a prompt of one row. Within a cell the contestants
take turns, each in a process of its own that lives as long as the benchmark and sleeps while others work. A turn warms
up, and then measures work of at least `--seconds`; medians over the turns, of wall-clock time and of the process's CPU
time. What a text costs once, such as the set-up of `generate`, is part of prefill, not of a step. A contestant passes
over a cell that takes more memory than is free.

A `product` cell measures the product of a batch of activations with the model's largest matrix, in jax and in torch. A
step's FLOPs a second are compared with the faster one's. The bytes of a step, which are the parameters and the cache of
keys and values once, and the state of linear attention twice, since it is read and written, are compared with what the
machine moves: the matrix in the product of one row, or a copy of a large array, whichever is faster.

Cells come in the order of their worth. Each is written to decode_<device>.json as soon as it is there, and a second
call with the same output goes on where the first one stopped. The goals and a plot come last.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks.decode_contestants import OUR_WAYS, OURS, THEIR_WAYS, Request
from benchmarks.machine import threads
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json
from supra_jax.model.presets import PRESETS

THEIRS = "transformers"
_PRESET = flags.DEFINE_enum("preset", "smollm2_135m", list(PRESETS), "Preset of the model's shape.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Number of layers; 0: as the preset.", lower_bound=0)
_CONTESTANTS = flags.DEFINE_list(
  "contestants", ["supra", "supra_window", THEIRS], f"Who takes part, of {', '.join(OURS)}, {THEIRS}."
)
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "32", "64"], "Numbers of rows that decode together.")
_CONTEXTS = flags.DEFINE_list("contexts", ["128", "512", "2048", "8192", "32768"], "Tokens that were read before.")
_PROMPTS = flags.DEFINE_list("prompts", ["128", "512", "2048", "8192"], "Tokens of a prompt.")
_NEW = flags.DEFINE_integer("new_tokens", 8, "Steps after which a context is cut back to its length.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Turns of each contestant in a cell.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.5, "Least time that a turn measures.", lower_bound=0)
_FRESH = flags.DEFINE_boolean("fresh", False, "Begin anew, without the results of an earlier call.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON and the plot.")

# Waiting threads of OpenMP sleep, so that the others have the cores. On a GPU two libraries share the device.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
ENVIRONMENT |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class Cell(NamedTuple):
  """What is measured: `decode` steps of a batch after a context, `prefill` of a prompt, or a `product` of a batch."""

  kind: str
  batch: int
  tokens: int


FIRST = [Cell("product", 1, 0), *(Cell("decode", 1, tokens) for tokens in (128, 2048, 8192))]
FIRST += [Cell("product", 32, 0), Cell("decode", 32, 128), Cell("prefill", 1, 512), Cell("prefill", 1, 8192)]
# (least ratio to the speed of transformers, cell)
GOALS = [(1.5, FIRST[1]), (2.0, FIRST[2]), (4.0, FIRST[3]), (1.2, FIRST[5]), (1.1, FIRST[6]), (1.5, FIRST[7])]
PRODUCT_SHARE, SLOPE = 0.8, 0.05
Results = dict[Cell, dict[str, dict[str, Any]]]


class Worker:
  """A contestant's process, which is started again if it died."""

  def __init__(self, name: str):
    command = [sys.executable, "-m", "benchmarks.decode_contestants", name, _PRESET.value, str(_LAYERS.value)]
    self._start = lambda: subprocess.Popen(
      command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self._process = self._start()
    self.about = self._answer()

  def ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer to a request; {"failed": why} if the process ends instead."""
    if self._process.poll() is not None:
      self._process = self._start()
      self._answer()
    print(to_json(request), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    return json.loads(line) if line else {"failed": f"exit status {self._process.wait()}"}


def wanted_cells() -> list[Cell]:
  """Returns the cells that the flags ask for, in the order of their worth."""
  batches, contexts = sorted(map(int, _BATCHES.value)), sorted(map(int, _CONTEXTS.value))
  cells = [Cell("decode", batch, tokens) for batch in batches for tokens in contexts]
  cells.sort(key=lambda cell: (cell.batch > 1 and cell.tokens > min(contexts), cell.batch * cell.tokens))
  cells = (
    [Cell("product", batch, 0) for batch in sorted({1, *batches})]
    + cells
    + [Cell("prefill", 1, int(n)) for n in _PROMPTS.value]
  )
  return [cell for cell in FIRST if cell in cells] + [cell for cell in cells if cell not in FIRST]


def entrants(cell: Cell, names: list[str]) -> dict[str, tuple[str, str]]:
  """Returns {label in the results: (contestant, way)} of a cell."""
  if cell.kind == "product":
    ours = [name for name in names if name != THEIRS][:1]
    return {"jax" if name in ours else "torch": (name, "") for name in [*ours, *names] if name in (*ours, THEIRS)}
  ways = {name: THEIR_WAYS if name == THEIRS else OUR_WAYS for name in names}
  return {f"{name} {way}".strip(): (name, way) for name in names for way in ways[name][cell.kind]}


def measure(cell: Cell, labels: dict[str, tuple[str, str]], workers: dict[str, Worker]) -> dict[str, dict[str, Any]]:
  """Gives all entrants their turns; returns {label: medians and all times, or why there are none}."""
  turns: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
  for _, (label, (name, way)) in itertools.product(range(_TURNS.value), labels.items()):
    if not turns[label] or "seconds" in turns[label][-1]:
      request = Request(way=way, steps=_NEW.value, seconds=_SECONDS.value, **cell._asdict())
      turns[label].append(workers[name].ask(dataclasses.asdict(request)))
  return {label: _summary(found) for label, found in turns.items()}


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
  if "seconds" not in turns[-1]:
    return turns[-1]
  medians = {name: statistics.median(turn[name] for turn in turns) for name in ("seconds", "process_seconds")}
  return turns[-1] | medians | {"all_seconds": [turn["seconds"] for turn in turns]}


def best(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
  """Returns the results of a contestant's faster way; None if there are none."""
  times = [result for label, result in found.items() if label.split()[0] == name and "seconds" in result]
  return min(times, key=lambda result: result["seconds"], default=None)


def product_rate(results: Results, batch: int) -> float | None:
  """Returns the FLOP/s of the faster product of a batch."""
  found = results.get(Cell("product", batch, 0), {})
  times = [result["seconds"] for result in found.values() if "seconds" in result]
  config = PRESETS[_PRESET.value]("softmax")
  return 2 * batch * config.hidden_size * config.vocab_size / min(times) if times else None


def lines(cell: Cell, results: Results, about: dict[str, Any]) -> Iterator[str]:
  """Yields a cell's lines of the table; `about` is what the workers said, with `ceilings`."""
  found, rate = results[cell], product_rate(results, cell.batch)
  bytes_rate = about["ceilings"].get("bytes_per_second", 0)
  if read := product_rate(results, 1):
    bytes_rate = max(bytes_rate, read / 2 * (4 if about["dtype"] == "float32" else 2))
  peer = best(found, THEIRS)
  for label, result in found.items():
    cells = [cell.kind, str(cell.batch), str(cell.tokens or ""), label]
    if "seconds" not in result:
      yield f"| {' | '.join([*cells, *'-' * 6])} | {' '.join(f'{how}: {why}' for how, why in result.items())} |"
      continue
    seconds = result["seconds"]
    cells += [f"{seconds * 1e3:.2f}", f"{result['process_seconds'] * 1e3:.2f}"]
    count = cell.batch if cell.kind == "decode" else cell.tokens
    cells += [f"{count / seconds:,.1f}" if count else "", f"{peer['seconds'] / seconds:.2f}x" if peer else ""]
    moved, flops = result.get("step_bytes"), result.get("step_flops")
    cells += [f"{moved / bytes_rate / seconds:.0%}" if moved and bytes_rate else ""]
    cells += [f"{flops / rate / seconds:.0%}" if flops and rate else ""]
    if cell.kind == "product" and rate:
      cells[-1] = f"{rate * min(r['seconds'] for r in found.values() if 'seconds' in r) / seconds / 1e9:,.0f} GFLOP/s"
    yield f"| {' | '.join(cells)} | {'better' if result is peer else ''} |"


def goals(results: Results, name: str) -> Iterator[tuple[str, bool | None]]:
  """Yields (goal and what was measured, whether it is met), None if it was not measured, for one of our contestants."""
  for least, cell in GOALS:
    ours, peer = best(results.get(cell, {}), name), best(results.get(cell, {}), THEIRS)
    what, said, reached = f"{cell.kind}, batch {cell.batch}, {cell.tokens} tokens: {least}x {THEIRS}", [], []
    if ours and peer:
      ratio = peer["seconds"] / ours["seconds"]
      said, reached = [f"{ratio:.2f}x"], [ratio >= least]
    if cell.batch > 1:
      what += f", or {PRODUCT_SHARE:.0%} of the product's rate"
      if ours and (rate := product_rate(results, cell.batch)):
        share = ours["step_flops"] / ours["seconds"] / rate
        said, reached = [*said, f"{share:.0%}"], [*reached, share >= PRODUCT_SHARE]
    yield f"{what}: {', '.join(said) or 'not measured'}", any(reached) if said else None
  level = [found for cell, found in results.items() if (cell.kind, cell.batch) == ("decode", 1)]
  times = [result["seconds"] for found in level if (result := best(found, name))]
  slope = max(times) / min(times) - 1 if len(times) > 1 else None
  said = "not measured" if slope is None else f"{slope:.1%}"
  yield (
    f"decode, batch 1: medians of all contexts within {SLOPE:.0%}: {said}",
    None if slope is None else slope <= SLOPE,
  )


def plot(results: Results, path: Path, title: str) -> None:
  """Draws tokens a second against the context at batch 1, and against the batch at the shortest context."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  decoded = {cell: found for cell, found in results.items() if cell.kind == "decode"}
  shortest = min(cell.tokens for cell in decoded)
  panels: list[tuple[str, str, Callable[[Cell], bool]]] = [
    ("batch 1", "tokens", lambda cell: cell.batch == 1),
    (f"context of {shortest} tokens", "batch", lambda cell: cell.tokens == shortest),
  ]
  names = dict.fromkeys(label.split()[0] for found in decoded.values() for label in found)
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
  for axis, (heading, along, chosen) in zip(axes, panels, strict=True):
    for name in names:
      points = sorted(
        (getattr(cell, along), cell.batch / result["seconds"])
        for cell, found in decoded.items()
        if chosen(cell) and (result := best(found, name))
      )
      axis.plot(*zip(*points, strict=True), "o-", label=name) if points else None
    axis.set(title=heading, xlabel="context, tokens" if along == "tokens" else "rows", ylabel="tokens a second")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, None)
    axis.grid(alpha=0.3)
    axis.legend() if axis.lines else None
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
  """Returns the report of an earlier call; raises UsageError if it was made with other settings."""
  if _FRESH.value or not path.exists():
    return {}
  report = json.loads(path.read_text())
  if other := [name for name, value in settings.items() if report.get(name, value) != value]:
    raise app.UsageError(
      f"{path} has another {', '.join(other)}: --fresh replaces it, --output names another directory."
    )
  return report


def main(_) -> None:
  if unknown := set(_CONTESTANTS.value) - {*OURS, THEIRS}:
    raise app.UsageError(f"--contestants={', '.join(unknown)}: wanted {', '.join(OURS)}, {THEIRS}.")
  has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  names = [name for name in _CONTESTANTS.value if name != THEIRS or has_torch]
  workers = {name: Worker(name) for name in names}
  if failed := {name: worker.about["failed"] for name, worker in workers.items() if "failed" in worker.about}:
    sys.exit(f"These did not start: {failed}")
  about = {key: value for worker in workers.values() for key, value in worker.about.items()}
  settings = {"preset": _PRESET.value, "new_tokens": _NEW.value, "threads": threads(), **about}
  stem = f"decode_{slug(about['device'])}"
  output = Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  report = _earlier(output / f"{stem}.json", settings)
  results: Results = {Cell(*map(row.get, Cell._fields)): row["results"] for row in report.get("cells", [])}
  speeds = report.get("ceilings") or workers[names[0]].ask({})
  report |= settings | {"python": platform.python_version(), "turns": _TURNS.value, "seconds": _SECONDS.value}
  report |= {"command": " ".join(["python -m benchmarks.decode", *sys.argv[1:]]), "ceilings": speeds}
  print(f"{about['device']}; {settings}; {speeds}")
  print("| what | rows | tokens | who | ms | CPU ms | tokens/s | speed-up | of bytes/s | of FLOP/s | |")
  print("| --- " * 11 + "|")
  for cell in wanted_cells():
    labels = entrants(cell, names)
    if not labels.keys() <= {label for label, found in results.get(cell, {}).items() if "failed" not in found}:
      results[cell] = measure(cell, labels, workers)
    rows = [{**cell._asdict(), "results": found} for cell, found in results.items()]
    (output / f"{stem}.json").write_text(to_json(report | {"cells": rows}, indent=1) + "\n")
    print(*lines(cell, results, report), sep="\n", flush=True)
  ours = next((name for name in names if name != THEIRS), None)
  for what, met in goals(results, ours) if ours else ():
    print(f"{ours}, {what}: {'-' if met is None else 'met' if met else 'missed'}")
  if importlib.util.find_spec("matplotlib") and any(cell.kind == "decode" for cell in results):
    plot(results, output / f"{stem}.png", f"{_PRESET.value}, {about['device']}, {threads()} threads")
  if any("failed" in result for found in results.values() for result in found.values()):
    sys.exit("Not all of it was measured.")


if __name__ == "__main__":
  app.run(main)
