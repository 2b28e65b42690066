"""Times the linear attention op and other people's attention: wall-clock time, forward and forward + backward.

    python -m benchmarks.linear_attention [--shapes=BxTxHxGxD,...] [--peers=false] [--budget=2] [--output=DIR]

`benchmarks/contestants.py` lists the contestants; those that are installed and run on the device take part, all on the
same random inputs. On a CPU they compute in float32 with the same number of threads, on a GPU in bfloat16.

Outputs are compared before anything is timed. Forward + backward computes the output, and the gradients of q, k and v
for a given cotangent of the output. The contestants of a cell take turns; the table shows medians of wall-clock time,
so nothing else should run on the machine. On a GPU a turn is as many calls as take 20 milliseconds, with one
synchronisation at the end. A cell is skipped ("-") where a call is expected to take longer than four times the budget,
extrapolated from half the length.

The columns "of the copy" and "of the product" divide the least time for the bytes and FLOPs of the op (`Shape.floor`),
at the speeds of a copy of a large array and of a large matrix product measured in the same run, by the time of the op.

Writes linear_attention_<device>.json and a plot beside it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import torch
from absl import app, flags

from benchmarks.contestants import CONTESTANTS, MODES, Inputs, Run, Shape, is_gpu, make_inputs
from benchmarks.machine import ceilings, threads
from supra_jax.core.run_record import cpu_name

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json

_SHAPES = flags.DEFINE_list("shapes", [], "BxTxHxGxD: rows, tokens, heads, key/value heads, width. Default: by device.")
_PEERS = flags.DEFINE_bool("peers", True, "Whether to time other people's implementations too.")
_BUDGET = flags.DEFINE_float("budget", 2.0, "Seconds to time a contestant in a cell for; at least three turns.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON and the plot.")

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPES = {
  "cpu": [Shape(1, tokens, heads, heads, width) for heads, width in ((9, 64), (8, 128)) for tokens in LENGTHS],
  # Heads of Llama-2-7B and Mistral-7B; shapes that pytorch/helion publishes for flash-linear-attention and itself; a
  # series of lengths.
  "gpu": [
    *(Shape(batch, tokens, 32, groups, 128) for batch, tokens in ((8, 2048), (1, 32768)) for groups in (32, 8)),
    *(Shape(*x, 128) for x in ((1, 8192, 96, 96), (2, 16384, 16, 16), (4, 2048, 16, 16), (4, 4096, 64, 64))),
    *(Shape(1, tokens, 16, 16, 64) for tokens in LENGTHS),
  ],
}
OURS = {"cpu": ("chunked_xla",), "gpu": ("triton", "mosaic_gpu", "chunked_xla")}  # ratios are to the first
MIN_TURNS, MAX_TURNS = 3, 25
GPU_TURN = 0.02  # seconds of a turn on a GPU
# Contestants whose outputs differ: those with decays of their own, and SDPA, which is another op.
OTHER_RESULTS = ("fla retention", "fla lightning", "SDPA")


def not_the_same_op(names: list[str], shape: Shape) -> dict[str, str]:
  """Returns {contestant: why it takes no part}: it fails, or its output differs and it is not of OTHER_RESULTS."""
  inputs, tolerance = make_inputs(shape), 2e-2 if is_gpu() else 1e-4

  def output_of(name: str) -> np.ndarray:
    start, wait = CONTESTANTS[name].make(inputs, CONTESTANTS[name].settings[0])["forward"]
    output = start()
    wait(output)
    output = np.asarray(output.float().cpu() if isinstance(output, torch.Tensor) else output, np.float32)
    if name == "lightning-attn":
      output = output.swapaxes(1, 2)
    return output.reshape(inputs.q.shape)

  wanted, failed = output_of("chunked_xla"), {}
  for name in names:
    try:
      difference = float(np.max(np.abs(output_of(name) - wanted)) / np.max(np.abs(wanted)))
      if not difference <= tolerance and name not in OTHER_RESULTS:
        failed[name] = f"its output differs by {difference:.1e} of the largest"
    except Exception as error:  # other people's kernels raise many types
      failed[name] = (str(error).strip() or repr(error)).splitlines()[0]
  return failed


def turn(run: Run, calls: int = 1, *, settle: bool = True) -> tuple[float, float]:
  """Times a call: (wall-clock seconds, CPU seconds of the process), means over `calls`.

  A pause before it lets the worker threads of the other library go to sleep.

  Args:
    run: the call.
    calls: number of calls to time together.
    settle: whether to make an untimed call first, so that caches and allocator settle after other contestants' turns.
  """
  start, wait = run
  time.sleep(0.005)
  if settle:
    wait(start())
  wall, process = time.perf_counter(), time.process_time()
  for _ in range(calls):
    result = start()
  wait(result)
  return (time.perf_counter() - wall) / calls, (time.process_time() - process) / calls


def best_setting(name: str, inputs: Inputs, mode: str):
  """Returns the fastest setting of a contestant, for these inputs and this mode."""
  make, settings = CONTESTANTS[name].make, CONTESTANTS[name].settings
  times = {}
  for setting in settings if len(settings) > 1 else ():
    run = make(inputs, setting)[mode]
    first = turn(run, settle=False)[0]  # one call has to do where it takes over a second
    times[setting] = min(turn(run)[0] for _ in range(3)) if first < 1 else first
  return min(times, key=lambda setting: times[setting], default=settings[0])


def time_cell(shape: Shape, mode: str, names: list[str]) -> dict[str, dict]:
  """Returns {contestant: median seconds, CPU seconds, and how they were measured} for one shape and mode."""
  inputs = make_inputs(shape)
  runs, cell, calls = {}, {}, {}
  failed: dict[str, dict] = {}
  for name in list(names):
    try:
      setting = best_setting(name, inputs, mode)
      runs[name] = CONTESTANTS[name].make(inputs, setting)[mode]
      turn(runs[name], settle=False)
      seconds = turn(runs[name], settle=False)[0]
    except Exception as error:  # other people's kernels raise many types
      failed[name] = {"failed": (str(error).strip() or repr(error)).splitlines()[0]}
      runs.pop(name, None)
      continue
    cell[name] = {} if setting is None else {"setting": setting}
    calls[name] = max(1, round(GPU_TURN / seconds)) if is_gpu() else 1
    cell[name]["settle"] = seconds < 1
  names = list(runs)
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
  for i in range(MAX_TURNS):
    for name in names:
      if i < MIN_TURNS or sum(wall * calls[name] for wall, _ in times[name]) < _BUDGET.value:
        times[name].append(turn(runs[name], calls[name], settle=cell[name]["settle"]))
  for name in names:
    wall, process = np.median(times[name], axis=0)
    del cell[name]["settle"]
    cell[name] |= {"seconds": wall, "process_seconds": process, "turns": len(times[name]), "calls": calls[name]}
  return cell | failed


def _lines(shape: Shape, cells: dict[str, dict], speeds: dict[str, float], itemsize: int) -> list[str]:
  lines, kind = [], "gpu" if is_gpu() else "cpu"
  for name in dict.fromkeys([name for mode in MODES for name in cells[mode]]):
    columns = ["x".join(map(str, shape)), name]
    for mode in MODES:
      found = cells[mode].get(name)
      if found is None or "failed" in found:
        columns += ["-" if found is None else "failed", *["-"] * 3]
        continue
      ours = next(name for name in (*OURS[kind], *cells[mode]) if "seconds" in cells[mode].get(name, {}))
      moved, flops = shape.floor(mode, itemsize)
      shares = moved / speeds["bytes_per_second"], flops / speeds["flops_per_second"]
      setting = f" ({found['setting']})" if "setting" in found else ""
      columns += [f"{found['seconds'] * 1e3:.3g}{setting}", f"{found['seconds'] / cells[mode][ours]['seconds']:.2f}x"]
      columns += [f"{share / found['seconds']:.0%}" if name != "SDPA" else "" for share in shares]
    lines.append("| " + " | ".join(columns) + " |")
  return lines


def _plot(rows: list[dict], path: Path, title: str) -> None:
  """Plots time against length, with a panel for each shape that has several lengths."""
  series: dict[tuple, list[dict]] = {}
  for row in rows:
    batch, _, *rest = row["shape"]
    series.setdefault((batch, *rest), []).append(row)
  series = {key: found for key, found in series.items() if len({row["shape"][1] for row in found}) > 1}
  if not series:
    return
  figure, axes = plt.subplots(1, len(series), figsize=(5.5 * len(series), 4.5), sharey=True, squeeze=False)
  for axis, ((batch, heads, groups, width), found) in zip(axes[0], series.items(), strict=True):
    names = dict.fromkeys(name for row in found for name in row["times"])
    for number, name in enumerate(names):
      for mode, style in zip(MODES, ("o--", "s-"), strict=True):
        chosen = [row for row in found if row["mode"] == mode and "seconds" in row["times"].get(name, {})]
        points = [(row["shape"][1], row["times"][name]["seconds"] * 1e3) for row in chosen]
        if points:
          axis.loglog(*zip(*points, strict=True), style, color=f"C{number}", label=f"{name}, {mode}", markersize=4)
    of = f" of {groups} groups" if groups != heads else ""
    axis.set(title=f"{batch} x {heads} heads{of}, width {width}", xlabel="tokens")
    axis.set_xscale("log", base=2)
    axis.grid(True, which="major", alpha=0.3)
  axes[0][0].set_ylabel("milliseconds")
  axes[0][-1].legend(fontsize=8)
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _device() -> str:
  return jax.devices()[0].device_kind if is_gpu() else cpu_name()


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def main(_) -> None:
  kind = "gpu" if is_gpu() else "cpu"
  torch.set_num_threads(threads())
  device = _device() if is_gpu() else f"{_device()}, {threads()} threads"
  packages = ("jax", "torch", "transformers", "flash-linear-attention", "lightning-attn", "triton")
  versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
  names = [*OURS[kind], *(name for name in CONTESTANTS if name not in OURS[kind] and _PEERS.value)]
  names = [name for name in names if CONTESTANTS[name].enters(kind)]
  shapes = [Shape(*map(int, shape.split("x"))) for shape in _SHAPES.value] or SHAPES[kind]
  itemsize = 2 if is_gpu() else 4
  speeds = ceilings()
  report = {
    "device": device,
    "threads": threads(),
    "versions": versions,
    "command": " ".join(["python -m benchmarks.linear_attention", *sys.argv[1:]]),
    "ceilings": speeds,
    "rows": [],
  }
  output, stem = Path(_OUTPUT.value), f"linear_attention_{slug(_device())}"
  output.mkdir(parents=True, exist_ok=True)
  print(f"{device}; {versions}; milliseconds, {'bfloat16' if is_gpu() else 'float32'}; in brackets block or chunk")
  copy, product = speeds["bytes_per_second"] / 1e9, speeds["flops_per_second"] / 1e12
  print(f"A copy moves {copy:,.1f} GB/s, a product does {product:,.2f} TFLOP/s.")
  columns = ["ratio", "of the copy", "of the product"]
  print("| " + " | ".join(["B x T x H x G x D", "who", "forward", *columns, "forward + backward", *columns]) + " |")
  print("| --- " * 10 + "|")
  for series in dict.fromkeys(shape._replace(tokens=0) for shape in shapes):
    failed = not_the_same_op(names, series._replace(tokens=256))
    for name, why in failed.items():
      print(f"{name} takes no part: {why}", flush=True)
      report.setdefault("failed", {})["x".join(map(str, series)) + f" {name}"] = why
    entered = [name for name in names if name not in failed]
    last: dict[str, dict[str, float]] = {mode: dict.fromkeys(names, 0.0) for mode in MODES}
    for shape in sorted(shape for shape in shapes if shape._replace(tokens=0) == series):
      cells = {}
      for mode in MODES:
        # Peers take up to four times as long when the length doubles.
        entrants = [name for name in entered if name in OURS[kind] or 4 * last[mode][name] <= 4 * _BUDGET.value]
        cells[mode] = time_cell(shape, mode, entrants)
        last[mode] = {name: cells[mode].get(name, {}).get("seconds", np.inf) for name in names}
        report["rows"].append({"shape": list(shape), "mode": mode, "times": cells[mode]})
      print(*_lines(shape, cells, speeds, itemsize), sep="\n", flush=True)
      # Written each time: what comes after may not be reached.
      (output / f"{stem}.json").write_text(to_json(report, indent=1) + "\n")

  dtype = "bfloat16" if is_gpu() else "float32"
  _plot(report["rows"], output / f"{stem}.png", f"{device}: median wall-clock time, {dtype}")


if __name__ == "__main__":
  app.run(main)
