"""Causal linear attention with a fixed decay per head: over a sequence, and as one step of an RNN for decoding."""

from kernels_pallas.api import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
