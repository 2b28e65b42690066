"""The contestants of `benchmarks/decode.py`. Each runs in a process of its own, and takes a turn when it is asked to.

The process reads requests from stdin and answers on stdout, a line of JSON each; see `serve`.

- `Ours`: our model, whose layers all have one mixer, through the programs that the engine runs for greedy texts.
- `Theirs`: transformers' LlamaForCausalLM with scaled_dot_product_attention, through `generate`.

All compute in bfloat16 on an accelerator, and in float32 on a CPU, unless their name has another dtype, with random
weights; those of int8 compute in bfloat16. A context is not read but
filled in: random keys and values of that length, or a random state.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ceilings, described, threads
from benchmarks.random_checkpoint import hf_shape
from supra_jax.core.plain_json import to_json
from supra_jax.core.programs import keep_programs
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import state_bytes, state_bytes_by_part, train_flops_per_token
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import layer

# Contestant -> what is measured -> the ways of doing it, of which the best counts.
OURS = ("supra", "supra_window", "memory", "softmax", "supra:bfloat16", "supra:int8")
OUR_WAYS = {"decode": ("",), "prefill": ("",), "product": ("",)}
THEIR_WAYS = {"decode": ("dynamic", "static"), "prefill": ("forward", "generate"), "product": ("",)}
PAUSE = 0.05  # seconds before a turn in which the threads of the others go to sleep
LONG = 1.0  # seconds of a piece of work that is not repeated to warm up
SPARE = 1.25  # free memory that is wanted, as a multiple of what a cell is known to need
PRODUCTS = 10  # matrix products that are timed together
# Does a piece of work, and returns (number of steps, prompts or products, [wall-clock seconds, CPU seconds]).
Piece = Callable[[], tuple[int, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Request:
  """A turn to take.

  Attributes:
    kind: `decode`, steps of decoding; `prefill`, from a prompt to its first token; `product`, of activations with the
      model's largest matrix.
    way: one of the contestant's ways of doing it.
    batch: number of rows.
    tokens: length of the context or the prompt.
    steps: number of steps to decode before the context is cut back to its length.
    seconds: least time to measure.
  """

  kind: str
  way: str
  batch: int
  tokens: int
  steps: int
  seconds: float


def now() -> np.ndarray:
  """Returns [wall-clock time, CPU time of this process], in seconds."""
  return np.array([time.perf_counter(), time.process_time()])


def looked_up(config: ModelConfig, dtype: Any) -> int:
  """Returns the bytes of an embedding of which a step of decoding reads single rows only."""
  return 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize


def free_memory() -> int:
  """Returns the bytes of main memory that a process may take."""
  return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])


def _memory_of_equal_bytes(config: ModelConfig) -> ModelConfig:
  """Returns the model whose layers are memories of as many bytes as `supra_window`'s state, one size for all heads."""
  from supra_jax.linearization.budget import within
  from supra_jax.linearization.starts import Memory

  every = range(config.num_layers)
  size = state_bytes(config.replace(layers=(layer("supra_window"),) * config.num_layers), 1)
  common, retained = within(Memory(state_bytes=size), config, every)
  return config.replace(layers=(dataclasses.replace(common, retained=(int(retained),)),) * config.num_layers)


class Ours:
  """Our model."""

  def __init__(self, name: str, config: ModelConfig):
    import jax
    import jax.numpy as jnp

    from supra_jax.inference.parameters import for_inference
    from supra_jax.model.int8 import in_int8
    from supra_jax.model.transformer import Transformer

    mixer, _, width = name.partition(":")

    keep_programs()
    self.config = config.replace(layers=(layer(mixer),) * config.num_layers)
    if mixer == "memory":
      self.config = _memory_of_equal_bytes(config)
    self.dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" and not width else "bfloat16")
    self.model = model = Transformer(self.config, dtype=self.dtype)

    @jax.jit
    def draw(key):
      params = model.init(key, jnp.zeros((1, 1), jnp.int32), method="logits")["params"]
      return jax.tree.map(lambda x: x.astype(self.dtype), params)

    self.params = jax.block_until_ready(for_inference(self.config, draw(jax.random.key(0))))
    if width == "int8":
      self.params = jax.tree.map(jnp.asarray, in_int8(self.params))
    self.weight_bytes = sum(x.nbytes for x in jax.tree.leaves(self.params)) - looked_up(config, self.dtype)

  def about(self) -> dict[str, Any]:
    import jax

    return {"device": described()["device"], "dtype": self.dtype.name, "jax": jax.__version__}

  def remembered(self, capacity: int) -> dict[str, int]:
    return state_bytes_by_part(self.config, capacity, self.dtype)

  def needs(self, request: Request) -> int:
    from supra_jax.inference.decode import capacity_for

    vocabulary = 20 * self.config.vocab_size  # logits, and what is known of each token that may be drawn
    return request.batch * (vocabulary + sum(self.remembered(capacity_for(request.tokens + request.steps)).values()))

  def free(self) -> int:
    import jax

    held = jax.devices()[0].memory_stats() or {}
    return held["bytes_limit"] - held["bytes_in_use"] if "bytes_limit" in held else free_memory()

  def step_bytes(self, request: Request) -> int:
    parts = self.remembered(request.tokens)
    return self.weight_bytes + request.batch * (sum(parts.values()) + parts.get("linear", 0))

  def decode(self, request: Request) -> Piece:
    import jax
    import jax.numpy as jnp

    from supra_jax.inference.decode import DECODE_TOKENS, capacity_for, decode_steps
    from supra_jax.inference.sampling import Draws, Sampling

    batch, calls = request.batch, math.ceil(request.steps / DECODE_TOKENS)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2**20, np.float32)
    state = self.model.init_state(batch, capacity_for(request.tokens + calls * DECODE_TOKENS))
    layers = jax.tree.map(lambda x: jnp.asarray(np.resize(noise, x.shape), x.dtype), state.layers)
    state = dataclasses.replace(state, layers=layers)
    draws = jax.tree.map(jnp.asarray, Draws.of([Sampling()] * batch, [()] * batch, self.config.vocab_size))
    token = jnp.asarray(rng.integers(0, self.config.vocab_size, batch, np.int32))

    def piece() -> tuple[int, np.ndarray]:
      nonlocal state, token, draws
      cached, position = (jnp.full(batch, request.tokens, jnp.int32) for _ in range(2))
      state = dataclasses.replace(state, cached=cached, position=position)
      began = now()
      for _ in range(calls):
        drawn, token, state, draws = decode_steps(
          self.model, DECODE_TOKENS, self.params, token, state, draws, np.False_, True
        )
      finite = np.asarray(drawn.finite)
      spent = now() - began
      if not finite.all():
        raise AssertionError("The logits are not finite.")
      return calls * DECODE_TOKENS, spent

    return piece

  def prefill(self, request: Request) -> Piece:
    from supra_jax.inference.decode import capacity_for, first_token, prefill
    from supra_jax.inference.sampling import Draws, Sampling

    prompt = np.random.default_rng(0).integers(0, self.config.vocab_size, (1, request.tokens), np.int32)

    def piece() -> tuple[int, np.ndarray]:
      began = now()
      state = self.model.init_state(1, capacity_for(request.tokens + request.steps))
      hidden, state = prefill(self.model, self.params, prompt, state)
      draws = Draws.of([Sampling()], prompt, self.config.vocab_size)
      first, _ = first_token(self.model, self.params, hidden, draws, np.False_, True)
      np.asarray(first.token)
      return 1, now() - began

    return piece

  def product(self, request: Request) -> Piece:
    import jax

    shapes = (request.batch, self.config.hidden_size), (self.config.hidden_size, self.config.vocab_size)
    x, w = (jax.random.normal(jax.random.key(0), shape, self.dtype) for shape in shapes)
    run = jax.jit(lambda x, w: x @ w)

    def piece() -> tuple[int, np.ndarray]:
      began = now()
      jax.block_until_ready([run(x, w) for _ in range(PRODUCTS)])
      return PRODUCTS, now() - began

    return piece


class Theirs:
  """transformers' model."""

  def __init__(self, config: ModelConfig):
    import torch
    import transformers

    self.config = config.replace(layers=(layer("softmax"),) * config.num_layers)
    self.gpu = torch.cuda.is_available()
    self.device, self.dtype = ("cuda", torch.bfloat16) if self.gpu else ("cpu", torch.float32)
    torch.set_num_threads(threads())
    torch.set_default_dtype(self.dtype)
    torch.set_default_device(self.device)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(**hf_shape(config), max_position_embeddings=2**20)
    self.model = transformers.LlamaForCausalLM(shape).eval()
    # Its name in the library's earlier releases is past_key_values.
    self.cache = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
    self.weight_bytes = sum(x.nbytes for x in self.model.parameters()) - looked_up(config, self.dtype)

  def about(self) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    name = torch.cuda.get_device_name() if self.gpu else described()["device"]
    return {"device": name, "dtype": str(self.dtype).removeprefix("torch."), **versions}

  def needs(self, request: Request) -> int:
    c = self.config
    tokens = request.batch * (request.tokens + request.steps)
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize * tokens

  def free(self) -> int:
    import torch

    if not self.gpu:
      return free_memory()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

  def step_bytes(self, request: Request) -> int:
    return self.weight_bytes + self.needs(dataclasses.replace(request, steps=0))

  def spent_since(self, began: np.ndarray) -> np.ndarray:
    import torch

    if self.gpu:
      torch.cuda.synchronize()
    return now() - began

  def ids(self, batch: int, tokens: int) -> Any:
    import torch

    return torch.randint(0, self.config.vocab_size, (batch, tokens))

  def generate(self, ids: Any, new: int, **how: Any) -> None:
    import torch

    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    self.model.generate(ids, attention_mask=mask, **lengths, do_sample=False, eos_token_id=None, pad_token_id=0, **how)

  def decode(self, request: Request) -> Piece:
    import torch
    import transformers

    batch, tokens, steps = request.batch, request.tokens, request.steps
    # The first step warms up: what is timed begins when the logits of the first token are there.
    room = tokens + 1 + steps
    ids, cache = self.ids(batch, tokens + 1), transformers.DynamicCache()
    if request.way == "static":
      cache = transformers.StaticCache(config=self.model.config, max_cache_len=room)
    keys, values = torch.randn(2, batch, self.config.num_kv_heads, tokens, self.config.head_dim)
    for number in range(self.config.num_layers):
      cache.update(keys, values, number)
    first: list[np.ndarray] = []

    def stamp(ids, scores):
      if not first:
        first.append(self.spent_since(np.zeros(2)))
      return scores

    def piece() -> tuple[int, np.ndarray]:
      first.clear()
      # Of these tokens the cache holds all but the last one, which `generate` reads first.
      self.generate(ids, 1 + steps, logits_processor=[stamp], **{self.cache: cache})
      spent = self.spent_since(first[0])
      cache.crop(tokens - int(cache.get_seq_length()))
      return steps, spent

    return piece

  def prefill(self, request: Request) -> Piece:
    ids = self.ids(1, request.tokens)

    def piece() -> tuple[int, np.ndarray]:
      began = now()
      if request.way == "generate":
        self.generate(ids, 1)
      else:
        self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
      return 1, self.spent_since(began)

    return piece

  def product(self, request: Request) -> Piece:
    import torch

    width = self.config.hidden_size
    x, w = torch.randn(request.batch, width), torch.randn(self.config.vocab_size, width)

    def piece() -> tuple[int, np.ndarray]:
      began = now()
      for _ in range(PRODUCTS):
        torch.nn.functional.linear(x, w)
      return PRODUCTS, self.spent_since(began)

    return piece


def take_turn(contestant: Ours | Theirs, request: Request, long: set[Request]) -> dict[str, Any]:
  """Takes a turn; returns seconds and CPU seconds a step, prompt or product, and the work of a step.

  Args:
    contestant: who takes it.
    request: what to do.
    long: requests that take too long to warm up first; this one is added if it does.
  """
  wanted, free = SPARE * contestant.needs(request), contestant.free()
  if wanted > free:
    return {"skipped": f"wants {wanted / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"}
  time.sleep(PAUSE)
  piece = getattr(contestant, request.kind)(request)
  if request not in long:
    piece()
  total, count = np.zeros(2), 0
  while total[0] < request.seconds:
    done, spent = piece()
    total, count = total + spent, count + done
    if spent[0] > LONG:
      long.add(request)
  found: dict[str, Any] = {"seconds": total[0] / count, "process_seconds": total[1] / count}
  if request.kind == "decode":
    found["step_bytes"] = contestant.step_bytes(request)
    found["step_flops"] = request.batch * train_flops_per_token(contestant.config, 1) / 3
  return found


def serve(name: str, preset: str, layers: str) -> None:
  """Makes a contestant, writes what it is about, and answers each request with a line: results, `skipped` or `failed`.

  Args:
    name: one of OURS, or `transformers`.
    preset: preset of the model's shape.
    layers: number of layers; 0: as the preset.
  """
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print is no answer
  config = PRESETS[preset](OURS[0])
  config = config.replace(layers=config.layers[:1] * (int(layers) or config.num_layers), sliding_window=None)
  contestant = Theirs(config) if name == "transformers" else Ours(name, config)
  print(to_json(contestant.about() | {"layers": config.num_layers}), file=answers)
  long: set[Request] = set()
  for line in sys.stdin:
    request = json.loads(line)
    try:
      reply = take_turn(contestant, Request(**request), long) if request else ceilings()
    except Exception as error:  # libraries raise many types
      reply = {"failed": (str(error).strip() or repr(error)).splitlines()[0][:300]}
    print(to_json(reply), file=answers)


if __name__ == "__main__":
  serve(*sys.argv[1:])
