"""What training and memory cost: FLOPs a token, worked out by hand, their share of a device's peak; a state's bytes."""

from __future__ import annotations

import math
import typing
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.model.config import Mixer, ModelConfig
from supra_jax.model.transformer import Transformer

# Multiply-accumulates of bfloat16 into float32, without sparsity; vendors often print twice that, "with sparsity". By
# jax's `device_kind` in full: a part of a card (MIG) has a kind of its own, and must not pass for the whole.
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
  """Model FLOPs of one token's forward and backward pass.

  Of these multiply-adds, two FLOPs each, a token needs forward; backward, of both factors' gradients, needs twice as
  many, so that FLOPs = 6 * (W + A):

    W = sum over layers of  D*(H*K + G*K + G*V) + H*V*D + 3*D*F + P,  and then D * vocabulary
    P = (H*K)^2 + (G*K)^2  for a dense feature map of a `supra` layer, (H + G)*K^2 for one per head, 0 for `softmax`
    A = sum over layers of  2*H*K*V  for `supra`: S += k v^T, then q S
                            H*(K + V)*n  for `softmax`: n = (T + 1)/2 keys seen on average, fewer with a window

  `supra_window` has P and A of `supra`, A of `softmax` with its own window and sinks, and H*V*D for its second output
  projection.

  The unembedding is counted, tied or not; the look-up of the embedding, norms, activations, RoPE and decays are not.
  Nor is what an implementation computes beyond the model: recomputation (remat), the products inside a chunk, masked
  halves. What is left is the numerator of MFU (Chowdhery et al. 2022, PaLM, appendix B), with the causal half of
  attention left out, as it is in FlashAttention's counts.

  Args:
    config: of the model. All of it is counted as trained.
    sequence_length: T, tokens that see each other.

  Raises:
    ValueError: the sequence has no token.
  """
  if sequence_length < 1:
    raise ValueError(f"sequence_length={sequence_length}: wanted at least 1.")
  c = config
  width, ffn, heads, groups, key, value = (
    c.hidden_size,
    c.intermediate_size,
    c.num_heads,
    c.num_kv_heads,
    c.head_dim,
    c.value_width,
  )
  projections = width * (heads * key + groups * key + groups * value) + heads * value * width
  layers = sum(projections + 3 * width * ffn + _mixing(c, mixer, sequence_length) for mixer in c.mixers)
  return 6.0 * (layers + width * c.vocab_size)


def step_flops_per_token(config: ModelConfig, sequence_length: int, teacher: ModelConfig | None = None) -> float:
  """`train_flops_per_token`, and a third of the teacher's where one runs in the step: its forward pass."""
  own = train_flops_per_token(config, sequence_length)
  return own if teacher is None else own + train_flops_per_token(teacher, sequence_length) / 3


def _mixing(c: ModelConfig, mixer: Mixer, time: int) -> float:
  """Multiply-adds a token of what only this mixer does, P + A above."""
  heads, groups, key, value = c.num_heads, c.num_kv_heads, c.head_dim, c.value_width

  def softmax(window: int | None) -> float:
    window = min(time, window or time)
    return heads * (key + value) * (window - window * (window - 1) / (2 * time))

  dense = c.supra.feature_map == "dense"
  features = (heads * key) ** 2 + (groups * key) ** 2 if dense else (heads + groups) * key**2
  supra = features + 2 * heads * key * value
  match mixer:
    case "softmax":
      return softmax(c.sliding_window)
    case "supra":
      return supra
    case "supra_window":
      return supra + softmax(c.supra.window + c.supra.sinks) + heads * value * c.hidden_size
  typing.assert_never(mixer)


def state_bytes(config: ModelConfig, tokens: int, dtype: Any = jnp.bfloat16) -> int:
  """Bytes of what a model remembers of one sequence of so many tokens, its caches in `dtype`."""
  state = jax.eval_shape(lambda: Transformer(config, dtype).init_state(1, tokens).layers)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 FLOP/s of the device; None where PEAK_FLOPS does not know its kind."""
  return PEAK_FLOPS.get(device.device_kind)


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
  """Model FLOPs utilisation: the share of the peak that the model's own FLOPs make up; None without a peak."""
  return None if peak is None else tokens_per_second_per_device * flops_per_token / peak
