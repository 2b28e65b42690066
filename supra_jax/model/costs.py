"""FLOPs per token by formula, model FLOPs utilisation (MFU), and the size of a model's state in bytes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import Transformer

# Peak FLOP/s of multiply-accumulates of bfloat16 into float32, without sparsity; vendors often print twice that, "with
# sparsity". The key is jax's `device_kind` in full: a part of a card (MIG) has a kind of its own, and must not be taken
# for the whole card.
PEAK_FLOPS: dict[str, float] = {
  # A device of jax is a chip, except for v3 and 7x, where it is one of a chip's two cores.
  # docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, "peak compute per chip (bf16)"
  "TPU v3": 123e12 / 2,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,
  # NVIDIA A100 Tensor Core GPU datasheet
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  # NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  # NVIDIA H200 and GH200 datasheets
  "NVIDIA H200": 989.4e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA GH200 480GB": 989.4e12,
  # NVIDIA Blackwell architecture technical brief: HGX B200, GB200
  "NVIDIA B200": 2250e12,
  "NVIDIA GB200": 2500e12,
  # NVIDIA L4, L40S, A10 datasheets
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA A10": 125e12,
}


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns the model FLOPs of the forward and backward pass per token.

  The forward pass needs W multiply-adds per token, two FLOPs each, and the backward pass twice as many, for the
  gradients of both factors: FLOPs = 6 W, with

    W = sum over layers of (multiply-adds of the mixer, `Mixer.flops`, + 3*D*F of the MLP) + D * vocab_size

  The unembedding is counted, tied or not. Not counted are the embedding's look-up, norms, activations, RoPE and decays,
  nor what an implementation computes beyond the model: recomputation (remat), the products inside a chunk, the masked
  half of attention. The result is the numerator of MFU (Chowdhery et al. 2022, PaLM, appendix B), except that the
  masked half of attention is left out, as in FlashAttention's counts.

  Args:
    config: config of the model; all parameters are counted as trained.
    sequence_length: T, length of a sequence in tokens.

  Raises:
    ValueError: `sequence_length` is less than 1.
  """
  if sequence_length < 1:
    raise ValueError(f"sequence_length={sequence_length}: wanted at least 1.")
  c = config
  mixing = sum(mixer_class(layer.mixer).flops(c, layer, sequence_length) for layer in c.layers)
  mlps = 3 * c.hidden_size * c.intermediate_size * sum(mixer_class(mixer).FEEDS for mixer in c.mixers)
  return 6.0 * (mixing + mlps + c.hidden_size * c.vocab_size)


def step_flops_per_token(config: ModelConfig, sequence_length: int, teacher: ModelConfig | None = None) -> float:
  """Returns the model FLOPs of a training step per token, with the forward pass of a teacher if the step runs one.

  The forward pass is a third of the teacher's `train_flops_per_token`.

  Raises:
    ValueError: `sequence_length` is less than 1.
  """
  own = train_flops_per_token(config, sequence_length)
  return own if teacher is None else own + train_flops_per_token(teacher, sequence_length) / 3


def state_bytes(config: ModelConfig, tokens: int, dtype: Any = None) -> int:
  """Returns the size in bytes of a model's state for one sequence.

  Args:
    config: config of the model.
    tokens: number of tokens that the state has room for.
    dtype: dtype of the keys and values in the state; the state of linear attention is always float32. None: what the
      layer's config names, bfloat16 if it names none.
  """
  return sum(state_bytes_by_part(config, tokens, dtype).values())


def sequence_bytes(config: ModelConfig, tokens: int) -> int:
  """Returns the size in bytes of all that inference holds of a sequence between two tokens.

  That is the state, its counters, and the last activations, from which the next token is drawn, in float32.
  """
  counters = 3 * jnp.dtype("int32").itemsize
  return state_bytes(config, tokens) + counters + config.hidden_size * jnp.dtype("float32").itemsize


def state_bytes_by_part(config: ModelConfig, tokens: int, dtype: Any = None) -> dict[str, int]:
  """Returns {part: size in bytes} of a model's state, summed over all layers, for the parts that `Mixer.PARTS` names.

  For the arguments see `state_bytes`.
  """
  return _bytes_by_part(Transformer(config, jnp.bfloat16, state_dtype=dtype), tokens)


def row_bytes(model: Transformer, tokens: int) -> int:
  """Returns the size in bytes of a row of the state that a model makes with room for `tokens` tokens."""
  return sum(_bytes_by_part(model, tokens).values())


def _bytes_by_part(model: Transformer, tokens: int) -> dict[str, int]:
  states = jax.eval_shape(lambda: model.init_state(1, tokens).layers)
  parts: dict[str, int] = {}
  for layer, state in zip(model.config.layers, states, strict=True):
    for part, fields in mixer_class(layer.mixer).PARTS.items():
      arrays = jax.tree.leaves([getattr(state, field) for field in fields])
      parts[part] = parts.get(part, 0) + sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return parts


def peak_flops(device: jax.Device) -> float | None:
  """Returns the peak FLOP/s of a device in bfloat16 without sparsity; None if its kind is not in PEAK_FLOPS."""
  return PEAK_FLOPS.get(device.device_kind)


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
  """Returns the model FLOPs utilisation (MFU): model FLOP/s per device as a share of the device's peak FLOP/s.

  Args:
    tokens_per_second_per_device: speed of training.
    flops_per_token: model FLOPs per token, from `train_flops_per_token` or `step_flops_per_token`.
    peak: peak FLOP/s of the device; None: not known, and the result is None.
  """
  return None if peak is None else tokens_per_second_per_device * flops_per_token / peak
