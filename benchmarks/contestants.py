"""Implementations of attention, ours and others', behind one interface, for `benchmarks/linear_attention.py` to time.

- `chunked_xla`, `triton`, `mosaic_gpu`: `kernels_pallas.linear_attention`, [B, T, H, D] in and out.
- `MiniMax`: the lightning attention of transformers, the same op. The real `MiniMaxLightningAttention` module with its
  projections, activation and norm replaced by identities: what remains is its loop over blocks, the split of the packed
  q, k, v before the loop, and a product with a gate of 1 after it. The fastest of several block sizes counts, chosen
  for each cell.
- `fla naive`: flash-linear-attention's chunked form in plain torch; the fastest of several chunk sizes counts.
- `fla simple_gla`, `fla retention`, `fla lightning`: Triton kernels of flash-linear-attention, the same op; the last
  two have decays of their own.
- `lightning-attn`: the Triton kernels of the package lightning-attn.
- `SDPA`: torch's causal scaled_dot_product_attention on contiguous [B, H, T, D], the op that linear attention replaces.

Implementations without grouped heads get keys and values that were repeated beforehand, untimed. All compute in float32
on a CPU, and in bfloat16 on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
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
# (start, wait): start() dispatches a call and returns its result, wait(result) blocks until all calls are done.
Run = tuple[Callable[[], Any], Callable[[Any], None]]
Runs = dict[str, Run]


class Shape(NamedTuple):
  """Shape of the operands.

  Attributes:
    batch: number of rows, B.
    tokens: tokens of a row, T.
    heads: number of query heads, H.
    groups: number of key/value heads, G.
    width: width of a head, D.
  """

  batch: int
  tokens: int
  heads: int
  groups: int
  width: int

  def floor(self, mode: str, itemsize: int) -> tuple[float, float]:
    """Least work of the op: (bytes to move each operand and result once, FLOPs in chunks of 64 tokens).

    Args:
      mode: one of MODES.
      itemsize: bytes of a number.
    """
    rows = self.batch * self.tokens
    q, k = rows * self.heads * self.width, rows * self.groups * self.width
    moved = {"forward": 2 * q + 2 * k, "forward+backward": 5 * q + 6 * k}[mode] * itemsize
    # FLOPs per token and head: q k^T and its product with v over half of a chunk's pairs; the state read and written.
    each = 2 * self.width * (64 + 2 * self.width)
    return moved, rows * self.heads * each * {"forward": 1, "forward+backward": 4}[mode]


class Inputs(NamedTuple):
  """Operands: q, k, v and the cotangent of the output, float32 [B, T, heads, D], and decay slopes [H]."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  cotangent: np.ndarray
  slopes: np.ndarray


class Contestant(NamedTuple):
  """An implementation that is timed.

  Attributes:
    devices: where it runs, of "cpu" and "gpu".
    module: name of the Python module that has to be installed.
    make: (inputs, setting) -> {mode: Run}.
    settings: block or chunk sizes, of which the fastest counts; None: no choice.
  """

  devices: tuple[str, ...]
  module: str
  make: Callable[[Inputs, Any], Runs]
  settings: tuple[Any, ...] = (None,)

  def enters(self, device: str) -> bool:
    """Whether it runs on `device`, "cpu" or "gpu", with the modules that are installed here."""
    return device in self.devices and importlib.util.find_spec(self.module) is not None


@functools.lru_cache(maxsize=1)
def make_inputs(shape: Shape) -> Inputs:
  """Draws random operands; q and k go through relu, as SUPRA's features do.

  Of large operands 2^24 numbers are drawn, and repeated: drawing all would take longer than the calls that are timed.
  """
  rng = np.random.default_rng(0)
  wide, narrow = ((shape.batch, shape.tokens, heads, shape.width) for heads in (shape.heads, shape.groups))

  def draw(size: tuple[int, ...]) -> np.ndarray:
    count = math.prod(size)
    return np.resize(rng.standard_normal(min(count, 2**24 - 1), np.float32), count).reshape(size)

  q, k, v, cotangent = map(draw, (wide, narrow, narrow, wide))
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
  """Makes the runs of a torch function.

  Args:
    call: the function.
    *arrays: its operands and, last, the cotangent of its output.
  """
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
  """In place of the output gate: returns inf, so that the gate is sigmoid(inf) = 1."""

  def forward(self, hidden: torch.Tensor) -> torch.Tensor:
    return torch.full((), torch.inf)


def minimax_module(heads: int, width: int, block_size: int) -> MiniMaxLightningAttention:
  """Makes MiniMax's attention module with an open gate, and identities as projections, activation and norm."""
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
