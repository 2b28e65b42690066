"""Attention as other people run it, and as we do, behind one shape: what `benchmarks/linear_attention.py` times.

- `chunked_xla`, `triton`, `mosaic_gpu`: `kernels_pallas.linear_attention`, [B, T, H, D] in and out.
- `MiniMax`: the lightning attention of transformers, the same op. It is the real `MiniMaxLightningAttention` module;
  its projections, activation and norm are replaced by identities, so that what is left is its loop over blocks, the
  split of the packed q, k, v before it, and one product with a gate of 1 after it. Of several block sizes the fastest
  counts, chosen anew for each cell.
- `fla naive`: flash-linear-attention's chunked form in plain torch, of several chunk sizes the fastest.
- `fla simple_gla`, `fla retention`, `fla lightning`: its Triton kernels, the same op; the last two with decays of
  their own.
- `lightning-attn`: the Triton kernels of the package of that name.
- `SDPA`: torch's causal scaled_dot_product_attention on contiguous [B, H, T, D], what the op replaces.

Those without grouped heads get keys and values repeated beforehand, untimed. On a CPU all compute in float32, on a GPU
in bfloat16.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from kernels_pallas import linear_attention, mosaic_gpu

MODES = ("forward", "forward+backward")
# Starts a run; a second call waits for all that were started.
Run = tuple[Callable[[], Any], Callable[[Any], None]]
Runs = dict[str, Run]


class Shape(NamedTuple):
  """Rows, tokens, query heads, key/value heads, width of a head."""

  batch: int
  tokens: int
  heads: int
  groups: int
  width: int

  def floor(self, mode: str, itemsize: int) -> tuple[float, float]:
    """(bytes, FLOPs) that the op cannot do without: each operand and result once; chunks of 64, and states."""
    rows = self.batch * self.tokens
    q, k = rows * self.heads * self.width, rows * self.groups * self.width
    moved = {"forward": 2 * q + 2 * k, "forward+backward": 5 * q + 6 * k}[mode] * itemsize
    # Half of a chunk's pairs of tokens, twice; the state read and written.
    each = 2 * self.width * (64 + 2 * self.width)
    return moved, rows * self.heads * each * {"forward": 1, "forward+backward": 4}[mode]


class Inputs(NamedTuple):
  """q, k, v and the output's cotangent, float32 [B, T, heads, D], and slopes [H]."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  cotangent: np.ndarray
  slopes: np.ndarray


class Contestant(NamedTuple):
  """Who runs where.

  Attributes:
    devices: "cpu", "gpu".
    module: that has to be installed.
    make: (inputs, setting) -> its runs.
    settings: of which the fastest counts.
  """

  devices: tuple[str, ...]
  module: str
  make: Callable[[Inputs, Any], Runs]
  settings: tuple[Any, ...] = (None,)

  def enters(self, device: str) -> bool:
    return device in self.devices and importlib.util.find_spec(self.module) is not None


def make_inputs(shape: Shape) -> Inputs:
  """Random; relu features, as SUPRA's are."""
  rng = np.random.default_rng(0)
  wide, narrow = ((shape.batch, shape.tokens, heads, shape.width) for heads in (shape.heads, shape.groups))
  q, k, v, cotangent = (rng.standard_normal(size, np.float32) for size in (wide, narrow, narrow, wide))
  slopes = minimax_module(shape.heads, shape.width, 64).slope_rate.numpy().reshape(shape.heads)
  return Inputs(np.maximum(q, 0), np.maximum(k, 0), v, cotangent, slopes)


def is_gpu() -> bool:
  return jax.default_backend() == "gpu"


def _ours(implementation: str, inputs: Inputs, setting: None) -> Runs:
  del setting
  dtype = jnp.bfloat16 if is_gpu() else jnp.float32
  q, k, v, cotangent = (jnp.asarray(x, dtype) for x in inputs[:4])

  def call(q, k, v):
    return linear_attention(q, k, v, inputs.slopes, scale=1.0, implementation=implementation)[0]

  @jax.jit
  def both(q, k, v, cotangent):
    output, pullback = jax.vjp(call, q, k, v)
    return output, pullback(cotangent)

  forward = jax.jit(call)
  return {
    "forward": (lambda: forward(q, k, v), jax.block_until_ready),
    "forward+backward": (lambda: both(q, k, v, cotangent), jax.block_until_ready),
  }


def _torch(call: Callable[..., torch.Tensor], *arrays: np.ndarray) -> Runs:
  """Runs of `call` on all arrays but the last, its output's cotangent."""
  device, dtype = ("cuda", torch.bfloat16) if is_gpu() else ("cpu", torch.float32)
  *leaves, cotangent = (torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype) for x in arrays)
  leaves = [leaf.requires_grad_() for leaf in leaves]

  def forward():
    with torch.no_grad():
      return call(*leaves)

  def both():
    return torch.autograd.grad(call(*leaves), leaves, cotangent)

  def wait(result):
    del result
    if device == "cuda":
      torch.cuda.synchronize()

  return {"forward": (forward, wait), "forward+backward": (both, wait)}


def _repeated(inputs: Inputs) -> tuple[np.ndarray, ...]:
  repeats = inputs.q.shape[2] // inputs.k.shape[2]
  return inputs.q, np.repeat(inputs.k, repeats, axis=2), np.repeat(inputs.v, repeats, axis=2), inputs.cotangent


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


def _minimax(inputs: Inputs, block_size: int) -> Runs:
  q, k, v, cotangent = _repeated(inputs)
  batch, tokens, heads, width = q.shape
  module = minimax_module(heads, width, block_size)
  packed = np.concatenate([q, k, v], axis=-1).reshape(batch, tokens, -1)
  call = lambda x: module(x, position_embeddings=None, attention_mask=None)[0]  # noqa: E731
  return _torch(call, packed, cotangent.reshape(batch, tokens, -1))


def _sdpa(inputs: Inputs, setting: None) -> Runs:
  del setting
  grouped = inputs.q.shape[2] != inputs.k.shape[2]
  call = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
  return _torch(call, *(x.swapaxes(1, 2) for x in inputs[:4]))


def _fla_naive(inputs: Inputs, chunk_size: int) -> Runs:
  from fla.ops.simple_gla.naive import naive_chunk_simple_gla

  log_decay = -torch.from_numpy(inputs.slopes).expand(inputs.q.shape[:3])
  call = lambda q, k, v: naive_chunk_simple_gla(q, k, v, log_decay, chunk_size=chunk_size, scale=1.0)[0]  # noqa: E731
  return _torch(call, *_repeated(inputs))


def _fla(name: str, inputs: Inputs, setting: None) -> Runs:
  del setting
  from fla.ops.lightning_attn import chunk_lightning_attn
  from fla.ops.retention import chunk_retention
  from fla.ops.simple_gla import chunk_simple_gla

  ops = {
    "simple_gla": functools.partial(chunk_simple_gla, g_gamma=-torch.from_numpy(inputs.slopes).cuda()),
    "retention": chunk_retention,
    "lightning": functools.partial(chunk_lightning_attn, layer_idx=0, num_layers=2),
  }
  return _torch(lambda q, k, v: ops[name](q, k, v, scale=1.0)[0], *_repeated(inputs))


def _lightning(inputs: Inputs, setting: None) -> Runs:
  del setting
  from lightning_attn.ops import lightning_attn_func

  slopes = torch.from_numpy(inputs.slopes).cuda()
  call = lambda q, k, v: lightning_attn_func(q, k, v, slopes)  # noqa: E731
  return _torch(call, *(x.swapaxes(1, 2) for x in _repeated(inputs)))


def _devices_of_mosaic_gpu() -> tuple[str, ...]:
  x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
  return ("gpu",) if mosaic_gpu.refusal(x, x, x) is None else ()


CONTESTANTS: dict[str, Contestant] = {
  "chunked_xla": Contestant(("cpu", "gpu"), "jax", functools.partial(_ours, "chunked_xla")),
  "triton": Contestant(("gpu",), "jax", functools.partial(_ours, "triton")),
  "mosaic_gpu": Contestant(_devices_of_mosaic_gpu(), "jax", functools.partial(_ours, "mosaic_gpu")),
  "MiniMax": Contestant(("cpu",), "transformers", _minimax, (32, 64, 128, 256, 512)),
  "fla naive": Contestant(("cpu",), "fla", _fla_naive, (32, 64, 128)),
  "fla simple_gla": Contestant(("gpu",), "fla", functools.partial(_fla, "simple_gla")),
  "fla retention": Contestant(("gpu",), "fla", functools.partial(_fla, "retention")),
  "fla lightning": Contestant(("gpu",), "fla", functools.partial(_fla, "lightning")),
  "lightning-attn": Contestant(("gpu",), "lightning_attn", _lightning),
  "SDPA": Contestant(("cpu", "gpu"), "torch", _sdpa),
}
