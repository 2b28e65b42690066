"""Times a whole optimizer step: our RNN, and torch's softmax transformer of the same shape.

    python -m benchmarks.train_step [--tokens=512,2048,8192] [--remat=none,none,matmuls] [--peers=torch,torch.compile]

A step is forward, cross-entropy over the whole vocabulary, backward, clipping and AdamW, on one row of T tokens.
Weights are random, since the time does not depend on them. Contestants:

- `supra_jax`: `TrainStep`, all layers SUPRA, stacked and scanned, as `supra_jax.bin.train` runs it.
- `torch`: transformers' LlamaForCausalLM, the kind of model that is linearised, with scaled_dot_product_attention. The
  faster of fused and foreach AdamW counts, and the faster of two losses: from all logits at once, or torch's chunked
  linear_cross_entropy.
- `torch.compile`: the same with model and loss compiled, and all logits at once, since compilation stops at
  linear_cross_entropy.

All compute in float32 on a CPU, and in bfloat16 from float32 master weights on a GPU. `--remat` is that of
`Transformer`, one for all lengths or one per length: the least rematerialisation that fits is the fastest. With `none`
torch keeps all activations, with `block` it recomputes whole layers, with `matmuls` all but products and attention.

Each contestant and length has a process of its own, one after another, with the same number of threads and the same
settings of the allocator: huge pages, and freed memory stays with the process, which saves both libraries the page
faults of a step's large temporaries. A process warms up, then measures the median of wall-clock time and its peak
memory, resident or of the GPU. Nothing else should run on the machine. For a process that fails, for lack of memory
say, the table has a "-" and the JSON the end of its stderr.

On a GPU, layers as wide as those of a 7B model, as many as fit beside their optimizer state:

    python -m benchmarks.train_step --preset=mistral_7b --layers=-1 --remat=block --tokens=2048

MFU then counts each contestant's own FLOPs (`supra_jax.model.costs`) of these layers and the vocabulary: nothing is
extrapolated to the whole model. This mode has not been run on a GPU yet.

Writes train_step_<device>.json and a plot beside it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.machine import resident_bytes, threads
from benchmarks.random_checkpoint import hf_shape
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json
from supra_jax.core.run_record import cpu_name
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import PEAK_FLOPS, mfu, train_flops_per_token
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import layer

_TOKENS = flags.DEFINE_list("tokens", ["512", "2048", "8192"], "Lengths T of the row, in tokens.")
_PRESET = flags.DEFINE_enum("preset", "smollm2_135m", list(PRESETS), "Preset of the model's shape.")
_LAYERS = flags.DEFINE_integer(
  "layers", 0, "Number of layers. 0: as the preset; -1: as many as fit into the GPU.", lower_bound=-1
)
_REMAT = flags.DEFINE_list("remat", ["none", "none", "matmuls"], "none, matmuls or block, for all lengths or each.")
_PEERS = flags.DEFINE_list("peers", ["torch", "torch.compile"], "Contestants beside supra_jax; --peers= for none.")
_BUDGET = flags.DEFINE_float("budget", 60.0, "Seconds to time a contestant at a length for; at least three steps.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON and the plot.")
_WORKER = flags.DEFINE_string("worker", "", "The contestant that this process runs; set by the benchmark itself.")

WARMUP_STEPS, MIN_STEPS, MAX_STEPS = 2, 3, 25
MEMORY_SHARE = 0.9  # share of a GPU's memory to fill with layers, since the allocator loses some to fragmentation
# Options of glibc's malloc; other C libraries ignore them. One arena, since only the first keeps large blocks.
TUNABLES = {"arena_max": 1, "hugetlb": 1, "mmap_max": 0, "trim_threshold": 10**12}
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 3e-5, (0.9, 0.95), 0.1, 1.0
# (takes a step and returns its loss, facts for the table and JSON, returns the peak of GPU memory in bytes or None).
Contestant = tuple[Callable[[], float], dict[str, Any], Callable[[], int | None]]


def our_step(config: ModelConfig, tokens: int, remat: str) -> Contestant:
  """Makes a training step of supra_jax, with random weights and tokens."""
  import jax
  import numpy as np

  from supra_jax.core.sharding import make_mesh, put_batch
  from supra_jax.model.transformer import Transformer
  from supra_jax.training.compiled import memory
  from supra_jax.training.optimizer import OptimizerConfig
  from supra_jax.training.step import TrainStep

  device, mesh = jax.devices()[0], make_mesh(devices=jax.devices()[:1])
  jax.set_mesh(mesh)
  dtype = "float32" if device.platform == "cpu" else "bfloat16"
  recipe = OptimizerConfig(
    learning_rate=LEARNING_RATE,
    beta1=BETAS[0],
    beta2=BETAS[1],
    weight_decay=WEIGHT_DECAY,
    clip_norm=CLIP_NORM,
    z_loss=0.0,  # torch's loss has none
  )
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens + 1), np.int32)
  batch = put_batch({"tokens": ids}, mesh)

  def compiled(config: ModelConfig):
    model = Transformer(config, dtype=jax.numpy.dtype(dtype), stacked=True, remat=remat)
    step = TrainStep(model, recipe, num_steps=10_000)
    shapes = step.state_shapes(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return step, shardings, step.compiled(shardings).lower(shapes, batch).compile()

  if _LAYERS.value < 0:
    few, more = (memory(compiled(_with_layers(config, layers))[2]).peak for layers in (2, 4))
    spare = MEMORY_SHARE * device.memory_stats()["bytes_limit"] - few
    config = _with_layers(config, min(2 + math.floor(spare / ((more - few) / 2)), config.num_layers))
  step, shardings, run = compiled(config)

  def init(key):
    return step.init(step.model.init(key, batch["tokens"][0, :, :1], method="logits")["params"])

  state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

  def take() -> float:
    nonlocal state
    state, metrics = run(state, batch)
    jax.block_until_ready(state)
    return float(metrics["loss"])

  facts = {"device": device.device_kind, "dtype": dtype, "layers": config.num_layers}
  facts["flops_per_token"] = train_flops_per_token(config, tokens)
  return take, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")


def torch_step(config: ModelConfig, tokens: int, remat: str, *, compiled: bool = False) -> Contestant:
  """Makes a training step of transformers' Llama with the shape of `config`, with random weights and tokens."""
  import torch
  import torch.nn.functional as F
  import transformers

  torch.set_num_threads(threads())
  torch.manual_seed(0)
  gpu = torch.cuda.is_available()
  device = torch.device("cuda" if gpu else "cpu")
  shape = transformers.LlamaConfig(
    **hf_shape(config),
    max_position_embeddings=max(tokens, config.max_positions or 0),
    use_cache=False,
  )
  with device:
    model = transformers.LlamaForCausalLM(shape).train()
    row = torch.randint(0, config.vocab_size, (1, tokens + 1))
  if remat != "none":
    kept = {"context_fn": functools.partial(_keeping_products, torch)} if remat == "matmuls" else {}
    model.gradient_checkpointing_enable({"use_reentrant": False, **kept})
  autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=gpu)
  table = model.lm_head.weight
  losses = {"all logits": lambda hidden: F.cross_entropy(F.linear(hidden, table).float(), row[0, 1:])}
  if hasattr(F, "linear_cross_entropy") and not compiled:
    options = torch.nn.LinearCrossEntropyOptions()
    losses["chunks"] = lambda hidden: F.linear_cross_entropy(hidden, table, row[0, 1:], options=options)
  optimizers: dict[str, torch.optim.AdamW] = {}

  def adamw(kind: str) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, **{kind: True})

  def settle() -> None:
    model.zero_grad(set_to_none=True)
    if gpu:
      torch.cuda.synchronize()

  def try_loss(name: str) -> None:
    with autocast():
      loss = losses[name](torch.randn(tokens, config.hidden_size, device=device, requires_grad=True))
    loss.backward()
    settle()

  def try_adamw(kind: str) -> None:
    for parameter in model.parameters():
      parameter.grad = torch.zeros_like(parameter)
    if kind not in optimizers:
      optimizers[kind] = adamw(kind)
    optimizers[kind].step()
    settle()

  compute_loss = losses[best_loss := _fastest(try_loss, losses)]
  # Only fused on a GPU, where the moments of two optimizers might not fit.
  best_adamw = _fastest(try_adamw, ["fused"] if gpu else ["fused", "foreach"])
  optimizers.clear()
  optimizer = adamw(best_adamw)

  def forward() -> torch.Tensor:
    with autocast():
      return compute_loss(model.model(input_ids=row[:, :-1]).last_hidden_state[0])

  if compiled:
    forward = torch.compile(forward)

  def take() -> float:
    loss = forward()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    settle()
    return float(loss.detach())

  facts = {"device": torch.cuda.get_device_name() if gpu else "cpu", "dtype": "bfloat16" if gpu else "float32"}
  facts |= {"layers": config.num_layers, "adamw": best_adamw, "loss": best_loss}
  teacher = config.replace(layers=(layer("softmax"),) * config.num_layers, sliding_window=None)
  facts["flops_per_token"] = train_flops_per_token(teacher, tokens)
  return take, facts, lambda: torch.cuda.max_memory_allocated() if gpu else None


def _keeping_products(torch: Any) -> Any:
  """`context_fn` of torch's checkpoint that keeps the results of a layer's products and attention."""
  aten = torch.ops.aten
  names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
  attentions = [getattr(aten, f"_scaled_dot_product_{name}").default for name in names]
  return torch.utils.checkpoint.create_selective_checkpoint_contexts([aten.mm.default, *attentions])


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
  "supra_jax": our_step,
  "torch": torch_step,
  "torch.compile": functools.partial(torch_step, compiled=True),
}


def _with_layers(config: ModelConfig, layers: int) -> ModelConfig:
  return config.replace(layers=(layer("supra"),) * layers)


def _fastest(run: Callable[[str], None], names: Iterable[str]) -> str:
  """Returns the name whose third run, after two that warm up, takes the least time."""
  names, times = list(names), {}
  for _ in range(3 if len(names) > 1 else 0):
    for name in names:
      began = time.perf_counter()
      run(name)
      times[name] = time.perf_counter() - began
  return min(names, key=lambda name: times.get(name, 0))


def measure(name: str, tokens: int, remat: str) -> dict[str, Any]:
  """Runs and measures a contestant in this process.

  Args:
    name: a key of CONTESTANTS.
    tokens: T.
    remat: what the backward pass recomputes.

  Returns:
    The row of the report, for JSON.
  """
  config = PRESETS[_PRESET.value]("supra")
  began = time.perf_counter()
  config = _with_layers(config, _LAYERS.value) if _LAYERS.value > 0 else config
  take, facts, gpu_memory = CONTESTANTS[name](config, tokens, remat)
  for _ in range(WARMUP_STEPS):
    take()
  facts["seconds_before"] = time.perf_counter() - began
  times: list[tuple[float, float]] = []
  while len(times) < MIN_STEPS or (len(times) < MAX_STEPS and sum(wall for wall, _ in times) < _BUDGET.value):
    wall, process = time.perf_counter(), time.process_time()
    loss = take()
    times.append((time.perf_counter() - wall, time.process_time() - process))
    if not math.isfinite(loss):
      raise AssertionError(f"the loss is {loss}")
  facts["seconds"], facts["process_seconds"] = (statistics.median(column) for column in zip(*times, strict=True))
  facts |= {"steps": len(times), "all_seconds": [wall for wall, _ in times]}
  facts["peak_bytes"] = gpu_memory() or resident_bytes(peak=True)
  facts["tokens_per_second"] = tokens / facts["seconds"]
  peak = PEAK_FLOPS.get(facts["device"]) if facts["dtype"] == "bfloat16" else None
  return facts | {"mfu": mfu(facts["tokens_per_second"], facts["flops_per_token"], peak)}


def run_process(name: str, tokens: int, remat: str, layers: int) -> dict[str, Any]:
  """Calls `measure` in a process of its own; {"failed": ...} if the process fails."""
  given = {"worker": name, "tokens": tokens, "remat": remat, "layers": layers}
  command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], *(f"--{k}={v}" for k, v in given.items())]
  tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
  env = os.environ | {"GLIBC_TUNABLES": tunables, "OMP_NUM_THREADS": f"{threads()}"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  if done.returncode:
    return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"}
  return json.loads(done.stdout.splitlines()[-1])


def _row(tokens: int, remat: str, name: str, found: dict[str, Any], ours: dict[str, Any]) -> str:
  cells = [f"{tokens}", remat, name, "-"]
  if "failed" not in found:
    ratio = f"{found['seconds'] / ours['seconds']:.2f}x" if "seconds" in ours else "-"
    share = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    cells[3:] = [
      f"{found['seconds']:.2f}",
      f"{found['process_seconds']:.2f}",
      f"{found['tokens_per_second']:.0f}",
      ratio,
    ]
    cells += [f"{found['peak_bytes'] / 1e9:.1f}", f"{found['layers']}", share]
  return "| " + " | ".join(cells) + " |"


def _plot(rows: list[dict], path: Path, title: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6.5, 4.5))
  for name in CONTESTANTS:
    chosen = [row for row in rows if row["contestant"] == name and "seconds" in row]
    if chosen:
      axis.plot([row["tokens"] for row in chosen], [row["tokens_per_second"] for row in chosen], "o-", label=name)
  axis.set(title=title, xlabel="T, tokens of a row", ylabel="tokens a second", ylim=(0, None))
  axis.set_xscale("log", base=2)
  axis.grid(alpha=0.3)
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main(_) -> None:
  if _WORKER.value:
    print(to_json(measure(_WORKER.value, int(_TOKENS.value[0]), _REMAT.value[0])))
    return
  remats = _REMAT.value * (len(_TOKENS.value) if len(_REMAT.value) == 1 else 1)
  if len(remats) != len(_TOKENS.value) or not set(remats) <= {"none", "matmuls", "block"}:
    raise app.UsageError(f"--remat={','.join(remats)}: wanted none, matmuls or block, one for all lengths or one each.")
  lengths = sorted(zip(map(int, _TOKENS.value), remats, strict=True))
  unknown = set(_PEERS.value) - set(CONTESTANTS)
  if unknown:
    raise app.UsageError(f"--peers: {', '.join(unknown)} is none of {', '.join(CONTESTANTS)}.")
  has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  entrants = ["supra_jax", *(_PEERS.value if has_torch else [])]
  packages = ("jax", "jaxlib", "torch", "transformers")
  versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
  report: dict[str, Any] = {
    "device": f"{cpu_name()}, {threads()} threads",
    "preset": _PRESET.value,
    "versions": {"python": platform.python_version(), **versions},
    "command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]]),
    "rows": [],
  }
  print(f"{report['device']}; {report['versions']}{'' if has_torch else '; torch and transformers are not here'}")
  print("| T | remat | contestant | s/step | process s | tokens/s | ratio | peak GB | layers | MFU |")
  print("| --- " * 10 + "|")
  output = Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  for tokens, remat in lengths:
    ours: dict[str, Any] = {}
    for name in entrants:
      found = run_process(name, tokens, remat, ours.get("layers", _LAYERS.value))
      ours = found if name == "supra_jax" else ours
      report["rows"].append({"tokens": tokens, "remat": remat, "contestant": name, **found})
      print(_row(tokens, remat, name, found, ours), flush=True)
      # Written each time: what comes after may not be reached.
      gpus = {row["device"] for row in report["rows"] if row.get("device", "cpu") != "cpu"}
      report["device"] = ", ".join(gpus) or report["device"]
      stem = f"train_step_{slug(', '.join(gpus) or cpu_name())}"
      (output / f"{stem}.json").write_text(to_json(report, indent=1) + "\n")
  if any("failed" in row for row in report["rows"] if row["contestant"] == "supra_jax"):
    sys.exit("Not all of ours was measured.")
  _plot(report["rows"], output / f"{stem}.png", f"{_PRESET.value}, a training step\n{report['device']}")


if __name__ == "__main__":
  app.run(main)
