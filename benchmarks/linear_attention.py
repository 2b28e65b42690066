"""The op on a CPU against other people's attention: wall-clock time, forward and forward + backward, float32.

    python -m benchmarks.linear_attention [--tokens=512,2048] [--budget=5] [--output=DIR]

Contestants, on the same random q, k, v with the same number of threads and a batch of one:

- `chunked_xla`: `kernels_pallas.linear_attention`, [B, T, H, K] in and out.
- `MiniMax`: the lightning attention of transformers, the same op. It is the real `MiniMaxLightningAttention` module;
  its projections, activation and norm are replaced by identities, so that what is left is its loop over blocks, the
  split of the packed q, k, v before it, and one product with a gate of 1 after it. Of several block sizes the fastest
  counts, chosen anew for each cell. The outputs of the two are compared before anything is timed.
- `SDPA`: torch's causal scaled_dot_product_attention on contiguous [B, H, T, K], what the op replaces.

Backward means the gradients of q, k and v of `sum(output * random)`: `jax.value_and_grad`, and `loss.backward()`. The
contestants of a cell take turns; the table shows medians of wall-clock time, so nothing else should be running. A cell
is given up ("-") where one run is expected to take longer than four times the budget, judging by half the length.

Writes linear_attention_<device>.json and a plot beside it.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
import transformers
from absl import app, flags
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from kernels_pallas import linear_attention

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_TOKENS = flags.DEFINE_list("tokens", ["512", "1024", "2048", "4096", "8192", "16384"], "Lengths T.")
_SHAPES = flags.DEFINE_list("shapes", ["9x64", "8x128"], "Heads x width.")
_BUDGET = flags.DEFINE_float("budget", 2.0, "Timed seconds for a contestant and cell, beyond three runs.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON and the plot.")

BLOCK_SIZES = (32, 64, 128, 256, 512)
MIN_RUNS, MAX_RUNS = 3, 25
MODES = ("forward", "forward+backward")
CONTESTANTS = ("chunked_xla", "MiniMax", "SDPA")
Run = Callable[[], object]


class _Open(torch.nn.Module):
  """An output gate that is open: sigmoid(inf) = 1."""

  def forward(self, hidden: torch.Tensor) -> torch.Tensor:
    return torch.full((), torch.inf)


def minimax_module(heads: int, width: int, block_size: int) -> MiniMaxLightningAttention:
  config = MiniMaxConfig(
    hidden_size=heads * width,
    head_dim=width,
    num_attention_heads=heads,
    num_key_value_heads=heads,
    num_hidden_layers=2,
    block_size=block_size,
    layer_types=["linear_attention", "full_attention"],
  )
  module = MiniMaxLightningAttention(config, layer_idx=0)
  for name in ("act_fn", "norm", "qkv_proj", "out_proj"):
    setattr(module, name, torch.nn.Identity())
  module.output_gate = _Open()
  return module


def _torch_runs(call: Callable[..., torch.Tensor], inputs: list[np.ndarray], cotangent: np.ndarray) -> dict[str, Run]:
  leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
  cotangent = torch.from_numpy(cotangent)

  def forward():
    with torch.no_grad():
      return call(*leaves)

  def both():
    for leaf in leaves:
      leaf.grad = None
    (call(*leaves) * cotangent).sum().backward()

  return {"forward": forward, "forward+backward": both}


def minimax_runs(q, k, v, cotangent, block_size: int) -> dict[str, Run]:
  batch, tokens, heads, width = q.shape
  module = minimax_module(heads, width, block_size)
  packed = np.concatenate([q, k, v], axis=-1).reshape(batch, tokens, -1)
  call = lambda x: module(x, position_embeddings=None, attention_mask=None)[0]  # noqa: E731
  return _torch_runs(call, [packed], cotangent.reshape(batch, tokens, -1))


def sdpa_runs(q, k, v, cotangent) -> dict[str, Run]:
  call = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
  *operands, cotangent = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v, cotangent))
  return _torch_runs(call, operands, cotangent)


def our_runs(q, k, v, cotangent, slopes) -> dict[str, Run]:
  operands = tuple(map(jnp.asarray, (q, k, v)))
  cotangent = jnp.asarray(cotangent)

  def call(q, k, v):
    return linear_attention(q, k, v, slopes, scale=1.0, implementation="chunked_xla")[0]

  forward = jax.jit(call)
  both = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(call(*x[:3]) * x[3]), argnums=(0, 1, 2)))
  return {
    "forward": lambda: jax.block_until_ready(forward(*operands)),
    "forward+backward": lambda: jax.block_until_ready(both(*operands, cotangent)),
  }


def make_inputs(tokens: int, heads: int, width: int) -> list[np.ndarray]:
  """Random q, k, v and cotangent [1, T, H, K]; relu features, as SUPRA's are."""
  rng = np.random.default_rng(0)
  q, k, v, cotangent = (rng.standard_normal((1, tokens, heads, width), np.float32) for _ in range(4))
  return [np.maximum(q, 0), np.maximum(k, 0), v, cotangent]


def slopes_of(heads: int, width: int) -> np.ndarray:
  return minimax_module(heads, width, 64).slope_rate.numpy().reshape(heads)


def check_same_op(heads: int, width: int) -> float:
  """The largest difference of the two linear contestants' outputs, relative to the largest output."""
  inputs = make_inputs(256, heads, width)
  ours = np.asarray(our_runs(*inputs, slopes_of(heads, width))["forward"]())
  theirs = minimax_runs(*inputs, 64)["forward"]().numpy().reshape(ours.shape)
  difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
  if difference > 1e-4:
    raise AssertionError(f"outputs differ by {difference:.1e}: the contestants do not compute the same")
  return difference


def once(run: Run, *, settle: bool = True) -> tuple[float, float]:
  """(wall, process) seconds. The pause lets the worker threads of the other library go to sleep.

  An untimed run before it lets caches and allocator settle after the other contestants' turns.
  """
  time.sleep(0.005)
  if settle:
    run()
  wall, process = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - wall, time.process_time() - process


def best_block(inputs: list[np.ndarray], mode: str) -> int:
  times = {}
  for size in BLOCK_SIZES:
    run = minimax_runs(*inputs, size)[mode]
    first = once(run, settle=False)[0]  # all that the longest lengths can afford
    times[size] = min(once(run)[0] for _ in range(3)) if first < 1 else first
  return min(times, key=times.get)


def time_cell(tokens: int, heads: int, width: int, mode: str, expected: dict[str, float]) -> dict[str, dict]:
  """Medians of each contestant for one length and mode; `expected` has seconds for those whose time can be foreseen."""
  inputs = make_inputs(tokens, heads, width)
  entrants = [name for name in CONTESTANTS if expected.get(name, 0) <= 4 * _BUDGET.value]
  runs, cell = {}, {name: {} for name in entrants}
  for name in entrants:
    if name == "MiniMax":
      cell[name]["block_size"] = best_block(inputs, mode)
      runs[name] = minimax_runs(*inputs, cell[name]["block_size"])[mode]
    elif name == "SDPA":
      runs[name] = sdpa_runs(*inputs)[mode]
    else:
      runs[name] = our_runs(*inputs, slopes_of(heads, width))[mode]
  times = {name: [] for name in entrants}
  for name in entrants:
    runs[name]()
  settle = {name: once(runs[name], settle=False)[0] < 1 for name in entrants}
  for i in range(MAX_RUNS):
    for name in entrants:
      if i < MIN_RUNS or sum(wall for wall, _ in times[name]) < _BUDGET.value:
        times[name].append(once(runs[name], settle=settle[name]))
  for name in entrants:
    wall, process = np.median(times[name], axis=0)
    cell[name] |= {"seconds": wall, "process_seconds": process, "runs": len(times[name])}
  return cell


def _row(heads: int, width: int, tokens: int, mode: str, cell: dict[str, dict]) -> str:
  ours = cell["chunked_xla"]["seconds"]
  columns = [f"H{heads} K{width}", f"{tokens}", f"{mode:16}", f"{ours * 1e3:.1f}"]
  for name in CONTESTANTS[1:]:
    found = cell.get(name)
    block = f" ({found['block_size']})" if found and "block_size" in found else ""
    columns += [f"{found['seconds'] * 1e3:.1f}{block}", f"{found['seconds'] / ours:.1f}x"] if found else ["-", "-"]
  return "| " + " | ".join(columns) + " |"


def _plot(rows: list[dict], path: Path, title: str) -> None:
  shapes = sorted({(row["heads"], row["width"]) for row in rows}, reverse=True)
  figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.5), sharey=True, squeeze=False)
  for axis, (heads, width) in zip(axes[0], shapes, strict=True):
    for color, name in zip(("C0", "C1", "C2"), CONTESTANTS, strict=True):
      for mode, style in zip(MODES, ("o--", "s-"), strict=True):
        chosen = [row for row in rows if (row["heads"], row["width"], row["mode"]) == (heads, width, mode)]
        points = [(row["tokens"], row["times"][name]["seconds"] * 1e3) for row in chosen if name in row["times"]]
        if points:
          axis.loglog(*zip(*points, strict=True), style, color=color, label=f"{name}, {mode}", markersize=4)
    axis.set(title=f"{heads} heads of width {width}", xlabel="tokens")
    axis.set_xscale("log", base=2)
    axis.grid(True, which="major", alpha=0.3)
  axes[0][0].set_ylabel("milliseconds")
  axes[0][-1].legend(fontsize=8)
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _device() -> str:
  """The CPU's name and, where the system tells them, family and model: rented CPUs often hide the rest."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    name, family, model = (
      re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE).group(1) for key in ("model name", "cpu family", "model")
    )
    return f"{name} (family {family}, model {model})"
  except (OSError, AttributeError):
    return platform.processor() or platform.machine()


def main(_) -> None:
  jax.config.update("jax_platforms", "cpu")
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  torch.set_num_threads(threads)
  device = f"{_device()}, {threads} threads"
  report = {
    "device": device,
    "threads": threads,
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
    "command": " ".join(["python -m benchmarks.linear_attention", *sys.argv[1:]]),
    "rows": [],
  }
  print(f"{device}; {report['versions']}; milliseconds, float32; in brackets MiniMax's best block size")
  print("| shape | T | mode | chunked_xla | MiniMax | ratio | SDPA | ratio |")
  print("| --- | --- | --- | --- | --- | --- | --- | --- |")
  for shape in _SHAPES.value:
    heads, width = map(int, shape.split("x"))
    check_same_op(heads, width)
    last: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    for tokens in sorted(map(int, _TOKENS.value)):
      for mode in MODES:
        # Of the torch contestants both get four times as slow, or close to it, when the length doubles.
        expected = {name: 4 * seconds for name, seconds in last[mode].items() if name != "chunked_xla"}
        cell = time_cell(tokens, heads, width, mode, expected)
        last[mode] = {name: cell[name]["seconds"] if name in cell else np.inf for name in CONTESTANTS}
        report["rows"].append({"heads": heads, "width": width, "tokens": tokens, "mode": mode, "times": cell})
        print(_row(heads, width, tokens, mode, cell), flush=True)

  output = Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  stem = "linear_attention_" + re.sub(r"[^a-z0-9]+", "_", _device().lower()).strip("_")
  (output / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
  _plot(report["rows"], output / f"{stem}.png", f"{device}: median wall-clock time, float32")


if __name__ == "__main__":
  app.run(main)
