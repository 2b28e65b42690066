"""Measures what an RNN recalls: multi-query associative recall by a small transformer and by the RNNs made of it.

    python -m benchmarks.mqar --workdir=DIR [--cpu_hours=1]

Trains a transformer of two layers on rows of 512 tokens (`supra_jax.data.mqar`), makes RNNs of the transformer by each
method of METHODS, and tunes each RNN with 0, 10 thousand, 100 thousand and 1 million tokens, of which the values behind
queries are learned: in rows of the test's length, or in short rows first. A cell is one teacher, method, kind of rows,
number of tokens and seed; its accuracy is the share of values that have the largest logit, for each number of pairs.
Queries are so far from their pairs that softmax attention over a window with as many bytes of state recalls nothing.

Cells run in order of worth. Each one is written to mqar_<device>.json at once: after a kill, the same command goes on.
No cell begins that would end beyond `--cpu_hours`, the CPU time of all starts together. Draws a plot beside the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.machine import described
from benchmarks.mqar_models import METHODS, TEACHERS, TUNINGS, Setting, cpu_seconds, make_teacher, measure
from kernels_pallas.verdict import slug
from supra_jax.bin.entry import run
from supra_jax.core.colours import CURVES
from supra_jax.core.files import into_place
from supra_jax.core.plain_json import to_json
from supra_jax.core.progress import Progress

BUDGETS = (1_000_000, 100_000, 0, 10_000)  # in order of worth
FIXED_TOKENS = 200_000  # what a cell costs beside tuning (compilation, test), in tokens of tuning


def study(
  setting: Setting, workdir: Path, stem: Path, cells: Sequence[tuple[str, str, str, int, int]], cpu_hours: float = 1e9
) -> dict[str, Any]:
  """Measures all cells (teacher, method, tuning, tokens, seed) that the JSON does not have yet; returns the JSON.

  Args:
    setting: what the cells have in common.
    workdir: directory of the teachers.
    stem: path of the JSON and of the plot, without suffix.
    cells: the cells, in order of worth.
    cpu_hours: hours of CPU time, of all starts together, to stop at. The very first cell always runs.

  Raises:
    ValueError: the JSON has cells of another setting, or as `make_teacher` and `measure`.
  """
  path = stem.with_suffix(".json")
  given = json.loads(to_json(dataclasses.asdict(setting)))
  report: dict[str, Any] = {"setting": given, "teachers": {}, "cells": []}
  if path.exists():
    report = json.loads(path.read_text())
    if report["setting"] != given:
      raise ValueError(f"{path} has cells of another setting: move it away.")
  report |= described() | {"command": " ".join(["python -m benchmarks.mqar", *sys.argv[1:]])}
  names = ("teacher", "method", "tuning", "tokens", "seed")
  done = {tuple(cell[name] for name in names) for cell in report["cells"]}
  left = [cell for cell in cells if cell not in done]
  total = sum(FIXED_TOKENS + cell[3] for cell in cells)
  first = total - sum(FIXED_TOKENS + cell[3] for cell in left)
  with Progress(total, "MQAR, {share:.0%}", {"cell": str}, first=first, desc="MQAR", unit="token") as progress:
    for cell in left:
      name, method, tuning, tokens, seed = cell
      cost = FIXED_TOKENS + tokens
      spent = sum(part["cpu_seconds"] for part in [*report["teachers"].values(), *report["cells"]])
      costs = sum(FIXED_TOKENS + part["tokens"] for part in report["cells"])
      rate = sum(part["cpu_seconds"] for part in report["cells"]) / max(costs, 1)
      if spent + rate * cost > 3600 * cpu_hours:
        progress.message(
          f"{spent / 60:.0f} minutes of CPU time are spent: {len(cells) - len(report['cells'])} cells left."
        )
        break
      teacher, report["teachers"][name] = make_teacher(workdir / slug(name), TEACHERS[name], setting)
      began = cpu_seconds()
      found = measure(METHODS[method], teacher, setting, tuning, tokens, seed)
      found["cpu_seconds"] = cpu_seconds() - began
      report["cells"].append(dict(zip(names, cell, strict=True)) | found)
      with into_place(path) as temporary:
        temporary.write_text(to_json(report, indent=1) + "\n")
      recalled = ", ".join(f"{share:.0%} of {pairs}" for pairs, share in found["accuracy"].items())
      progress.message(f"{method}, {tuning}, {tokens:,} tokens, seed {seed}, {name}: {recalled}")
      progress.advance_to(progress.done + cost, cell=f"{len(report['cells'])} cells")
  return report


def accuracy(report: dict[str, Any], teacher: str, tuning: str, tokens: int, pairs: str) -> dict[str, float]:
  """Returns {method: accuracy with so many pairs after so many tokens of tuning, mean over seeds}."""
  found: dict[str, list[float]] = {}
  for cell in report["cells"]:
    if (cell["teacher"], cell["tuning"], cell["tokens"]) == (teacher, tuning, tokens):
      found.setdefault(cell["method"], []).append(cell["accuracy"][pairs])
  return {method: statistics.fmean(shares) for method, shares in found.items()}


def table(report: dict[str, Any], teacher: str, tuning: str) -> str:
  """Formats accuracies in percent, means over seeds, as a Markdown table."""
  pairs = [str(number) for number in report["setting"]["pairs"]]
  lines = ["| method | state, bytes | tokens | seeds |" + "".join(f" {n} pairs |" for n in pairs)]
  lines.append("| --- " * (len(pairs) + 4) + "|")
  chosen = [cell for cell in report["cells"] if (cell["teacher"], cell["tuning"]) == (teacher, tuning)]
  for method, tokens in sorted({(cell["method"], cell["tokens"]) for cell in chosen}):
    cells = [cell for cell in chosen if (cell["method"], cell["tokens"]) == (method, tokens)]
    shares = " | ".join(f"{100 * accuracy(report, teacher, tuning, tokens, n)[method]:.1f}" for n in pairs)
    lines.append(f"| {method} | {cells[0]['state_bytes']:,} | {tokens:,} | {len(cells)} | {shares} |")
  return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
  """Draws accuracy against pairs, against tokens of tuning and against bytes of state; means over seeds."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  pairs = [str(number) for number in report["setting"]["pairs"]]
  teachers, most, tuning = list(report["teachers"]), pairs[len(pairs) // 2], TUNINGS[0]
  budgets = sorted({cell["tokens"] for cell in report["cells"]})
  methods = list(dict.fromkeys(cell["method"] for cell in report["cells"]))
  figure, (by_pairs, by_tokens, by_bytes) = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
  for number, method in enumerate(methods):
    style: dict[str, Any] = {"color": CURVES[number % len(CURVES)], "marker": "o^"[number // len(CURVES) % 2]}
    for kind, line in zip(TUNINGS, ("-", ":"), strict=True):
      curve = {n: accuracy(report, teachers[0], kind, budgets[-1], n).get(method, np.nan) for n in pairs}
      label = method if line == "-" else None
      by_pairs.plot(list(map(int, curve)), list(curve.values()), line, label=label, **style)
    curve = {tokens: accuracy(report, teachers[0], tuning, tokens, most).get(method, np.nan) for tokens in budgets}
    by_tokens.plot(list(curve), list(curve.values()), **style)
    at = {
      cell["state_bytes"]: accuracy(report, cell["teacher"], tuning, cell["tokens"], most)[method]
      for cell in sorted(report["cells"], key=lambda cell: cell["state_bytes"])
      if (cell["method"], cell["tuning"], cell["tokens"]) == (method, tuning, budgets[-1])
    }
    by_bytes.plot(list(at), list(at.values()), **style)
  for teacher in report["teachers"].values():
    by_bytes.plot(teacher["state_bytes"], teacher["accuracy"][most], "k*")
  shares = report["teachers"][teachers[0]]["accuracy"]
  by_pairs.plot(list(map(int, shares)), list(shares.values()), "k--", label="the transformer")
  by_pairs.set(xlabel="pairs", ylabel="accuracy", xscale="log", ylim=(-0.03, 1.03))
  by_pairs.set_title(f"{teachers[0]}, {budgets[-1]:,} tokens; dotted: long rows alone", fontsize=10)
  by_pairs.set_xticks(list(map(int, pairs)), pairs)
  by_pairs.minorticks_off()
  by_tokens.set(xlabel="tokens of tuning")
  by_tokens.set_xscale("symlog", linthresh=max(budgets[1] if len(budgets) > 1 else 1, 1))
  by_tokens.set_title(f"{teachers[0]}, {most} pairs", fontsize=10)
  by_bytes.set(xlabel="KiB of state")
  by_bytes.set_xscale("log", base=2)
  by_bytes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}")
  by_bytes.set_title(f"{most} pairs, {budgets[-1]:,} tokens; star: the transformer", fontsize=10)
  for axis in (by_pairs, by_tokens, by_bytes):
    axis.grid(alpha=0.3)
  figure.suptitle(report["device"], fontsize=9)
  figure.legend(loc="outside right center", fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main() -> None:
  stem = Path(_OUTPUT.value, f"mqar_{slug(described()['device'])}")
  stem.parent.mkdir(parents=True, exist_ok=True)
  seeds = range(_SEEDS.value)
  main_teacher, *others = _TEACHERS.value
  budgets = list(map(int, _BUDGETS.value))
  cells = []
  for seed in seeds:
    for tuning in TUNINGS:
      cells += [(main_teacher, m, tuning, tokens, seed) for tokens in budgets for m in _METHODS.value]
      # The other transformers show other sizes of state.
      cells += [(name, m, tuning, budgets[0], seed) for name in others for m in _METHODS.value]
  report = study(Setting(seed=_TEACHER_SEED.value), Path(_WORKDIR.value), stem, cells, _CPU_HOURS.value)
  if report["cells"]:
    plot(report, stem.with_suffix(".png"))
  for name in report["teachers"]:
    for tuning in TUNINGS:
      print(f"{name}, {tuning}\n{table(report, name, tuning)}\n")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the transformers.", required=True)
  _CPU_HOURS = flags.DEFINE_float("cpu_hours", 1e9, "Hours of CPU time, of all starts together, to stop at.")
  _SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of the tuning.", lower_bound=1)
  _TEACHER_SEED = flags.DEFINE_integer("teacher_seed", 0, "Seeds the transformers and the test.", lower_bound=0)
  _METHODS = flags.DEFINE_list("methods", list(METHODS), "Methods to run, of METHODS.")
  _TEACHERS = flags.DEFINE_list("teachers", list(TEACHERS), "Transformers, of TEACHERS; the main one first.")
  _BUDGETS = flags.DEFINE_list("budgets", list(map(str, BUDGETS)), "Numbers of tokens to tune with.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON and the plot.")
  run(main)
