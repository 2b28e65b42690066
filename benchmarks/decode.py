"""Times prefill and decoding with random weights: our RNNs, and transformers' own generate with softmax attention.

    python -m benchmarks.decode [--preset=mistral_7b] [--layers=8] [--batches=1,16] [--prompt=2048] [--new_tokens=64]

Contestants:

- `supra_window`, `supra`: a model whose layers all have this mixer. The prompt is read in pieces, as `generate` does.
- `transformers`: MistralForCausalLM in PyTorch, with scaled_dot_product_attention and a cache of keys and values.

All compute in bfloat16 on a GPU, and in float32 on a CPU. Each contestant has a process of its own. Prefill reads the
prompt until its last logits; a step decodes one token of each row; medians over three texts. The floor of a step is the
time in which a copy of a large array moves the bytes of the step: parameters and the cache of keys and values once, the
state of linear attention twice, since it is read and written.

Writes decode_<device>.json after each row.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.random_checkpoint import hf_shape
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json
from supra_jax.model.config import ModelConfig
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import layer

_PRESET = flags.DEFINE_enum("preset", "mistral_7b", list(PRESETS), "Preset of the model's shape.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Number of layers; 0: as the preset.", lower_bound=0)
_CONTESTANTS = flags.DEFINE_list("contestants", ["supra_window", "supra", "transformers"], "Who takes part.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Numbers of rows.")
_PROMPT = flags.DEFINE_integer("prompt", 2048, "Tokens of the prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens to decode.", lower_bound=2)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON.")
_WORKER = flags.DEFINE_string("worker", "", "The contestant that this process runs; set by the benchmark itself.")

TEXTS = 3
# (prefill in seconds, a step of decoding in seconds)
Run = Callable[[], tuple[float, float]]


def ours(config: ModelConfig, batch: int) -> tuple[Run, dict[str, Any]]:
  """Makes the run of our model, and facts about it: device and bytes of a step."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from supra_jax.inference.decode import DECODE_TOKENS, capacity_for, decode_steps, first_token, prefill
  from supra_jax.inference.sampling import Draws, Sampling
  from supra_jax.model.costs import state_bytes
  from supra_jax.model.transformer import Transformer

  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  model = Transformer(config, dtype=dtype)

  @jax.jit
  def draw(key):
    params = model.init(key, jnp.zeros((1, 1), jnp.int32), method="logits")["params"]
    return jax.tree.map(lambda x: x.astype(dtype), params)

  params = jax.block_until_ready(draw(jax.random.key(0)))
  prompt = np.random.default_rng(0).integers(0, config.vocab_size, (batch, _PROMPT.value), np.int32)
  capacity = capacity_for(_PROMPT.value + _NEW.value)
  blank = Draws.of([Sampling()] * batch, [()] * batch, config.vocab_size)

  def run() -> tuple[float, float]:
    state = jax.block_until_ready(model.init_state(batch, capacity))
    began = time.perf_counter()
    hidden, state = jax.block_until_ready(prefill(model, params, prompt, state))
    first, draws = first_token(model, params, hidden, blank, np.False_)
    token = jax.block_until_ready(first.token)
    read = time.perf_counter()
    calls = math.ceil(_NEW.value / DECODE_TOKENS)
    for _ in range(calls):
      drawn, token, state, draws = decode_steps(model, DECODE_TOKENS, params, token, state, draws, np.False_)
    jax.block_until_ready(drawn)
    return read - began, (time.perf_counter() - read) / (calls * DECODE_TOKENS)

  remembered = 2 * batch * state_bytes(config, capacity, dtype)
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  return run, _facts(jax.devices()[0].device_kind, dtype.dtype.name, weights, remembered)


def _facts(device: str, dtype: str, weights: int, remembered: int) -> dict[str, Any]:
  return {"device": device, "dtype": dtype, "weight_bytes": weights, "step_bytes": weights + remembered}


def theirs(config: ModelConfig, batch: int) -> tuple[Run, dict[str, Any]]:
  """Makes the run of transformers' model, and facts about it."""
  import torch
  import transformers

  gpu = torch.cuda.is_available()
  device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
  shape = transformers.MistralConfig(
    **hf_shape(config),
    max_position_embeddings=32768,
    sliding_window=None,
  )
  torch.manual_seed(0)
  torch.set_default_dtype(dtype)
  with torch.device(device):
    model = transformers.MistralForCausalLM(shape).eval()
    prompt = torch.randint(0, config.vocab_size, (batch, _PROMPT.value))
  greedy = functools.partial(model.generate, prompt, do_sample=False, eos_token_id=None, pad_token_id=0)

  def seconds(count: int) -> float:
    began = time.perf_counter()
    with torch.no_grad():
      greedy(max_new_tokens=count, min_new_tokens=count)
    if gpu:
      torch.cuda.synchronize()
    return time.perf_counter() - began

  def run() -> tuple[float, float]:
    first = seconds(1)
    return first, (seconds(1 + _NEW.value) - first) / _NEW.value

  weights = sum(x.numel() * x.element_size() for x in model.parameters())
  itemsize = torch.finfo(dtype).bits // 8
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch * _PROMPT.value * itemsize
  name = torch.cuda.get_device_name() if gpu else "cpu"
  return run, _facts(name, str(dtype).split(".")[1], weights, cache)


def measure(name: str, batch: int) -> dict[str, Any]:
  """Runs a contestant in this process and returns its row."""
  from benchmarks.machine import ceilings

  config = PRESETS[_PRESET.value]("supra")
  mixer = "softmax" if name == "transformers" else name
  config = config.replace(layers=(layer(mixer),) * (_LAYERS.value or config.num_layers), sliding_window=None)
  run, facts = (theirs if name == "transformers" else ours)(config, batch)
  run()  # compiles
  prefills, steps = zip(*(run() for _ in range(TEXTS)), strict=True)
  row = {"contestant": name, "batch": batch, "layers": config.num_layers, **facts}
  row |= {"prefill_seconds": statistics.median(prefills), "step_seconds": statistics.median(steps)}
  return row | ({} if name == "transformers" else {"copy_bytes_per_second": ceilings()["bytes_per_second"]})


def run_process(name: str, batch: int) -> dict[str, Any]:
  """Calls `measure` in a process of its own; {"failed": ...} if the process fails."""
  given = [f"--worker={name}", f"--batches={batch}"]
  command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], *given]
  done = subprocess.run(command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True, check=False)
  if done.returncode:
    failed = f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"
    return {"contestant": name, "batch": batch, "failed": failed}
  return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict[str, Any], copy: float | None) -> str:
  cells = [row["contestant"], str(row["batch"])]
  if "failed" in row:
    return "| " + " | ".join([*cells, *"-" * 4, row["failed"].splitlines()[-1][-60:]]) + " |"
  read, step = row["batch"] * _PROMPT.value / row["prefill_seconds"], row["step_seconds"]
  share = f"{row['step_bytes'] / copy / step:.0%}" if copy else "-"
  cells += [f"{read:,.0f}", f"{step * 1e3:.2f}", f"{row['batch'] / step:,.0f}", share, f"{row['step_bytes'] / 1e9:.2f}"]
  return "| " + " | ".join(cells) + " |"


def main(_) -> None:
  if _WORKER.value:
    print(to_json(measure(_WORKER.value, int(_BATCHES.value[0]))))
    return
  has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  if unknown := set(_CONTESTANTS.value) - {"supra_window", "supra", "transformers"}:
    raise app.UsageError(f"--contestants={', '.join(unknown)}: wanted supra_window, supra, transformers.")
  entrants = [name for name in _CONTESTANTS.value if name != "transformers" or has_torch]
  what = {"preset": _PRESET.value, "prompt": _PROMPT.value, "new_tokens": _NEW.value}
  report: dict[str, Any] = {**what, "command": " ".join(["python -m benchmarks.decode", *sys.argv[1:]]), "rows": []}
  output = Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  print("| contestant | rows | prefill tokens/s | ms a step | tokens/s | of the copy | GB a step |")
  print("| --- " * 7 + "|")
  copy = None
  for batch in map(int, _BATCHES.value):
    for name in entrants:
      row = run_process(name, batch)
      report["rows"].append(row)
      copy = row.get("copy_bytes_per_second", copy)
      print(_line(row, copy), flush=True)
      device = next((row["device"] for row in report["rows"] if "device" in row), "unknown")
      (output / f"decode_{slug(device)}.json").write_text(to_json(report, indent=1) + "\n")
  if any("failed" in row for row in report["rows"]):
    sys.exit("Not all of it was measured.")


if __name__ == "__main__":
  app.run(main)
