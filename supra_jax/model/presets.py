"""Configs of well-known models, and of a tiny one; the argument `mixer` is the mixer of all layers."""

from __future__ import annotations

from collections.abc import Callable

from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.registry import MixerConfig, layer


def smollm2_135m(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of SmolLM2-135M (HuggingFaceTB/SmolLM2-135M), with grouped heads and tied embeddings."""
  return ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    layers=(layer(mixer),) * 30,
    rope=RopeConfig(base=100_000.0),
    tie_embeddings=True,
    max_positions=8192,
  )


def mistral_7b(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of Mistral-7B-v0.1 (mistralai/Mistral-7B-v0.1), the paper's main teacher."""
  return ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    layers=(layer(mixer),) * 32,
    sliding_window=4096,
    max_positions=32768,
    bos_token_id=1,
    eos_token_ids=(2,),
  )


def llama2_7b(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of Llama-2-7B (meta-llama/Llama-2-7b-hf), the paper's other teacher."""
  return ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    layers=(layer(mixer),) * 32,
    max_positions=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
  )


def open_lm_1b(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of OpenLM's 1B model (mlfoundations/open_lm, open_lm_1b.json), for GPT-NeoX's tokenizer."""
  return ModelConfig(
    vocab_size=50432,
    hidden_size=2048,
    intermediate_size=5632,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    layers=(layer(mixer),) * 24,
    norm="layer_norm",
    max_positions=2048,
    bos_token_id=0,
    eos_token_ids=(0,),
  )


def llama_3_2_1b(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of Llama-3.2-1B-Instruct (meta-llama/Llama-3.2-1B-Instruct), for conversations."""
  return ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    layers=(layer(mixer),) * 16,
    rope=RopeConfig(500_000.0, "llama3", factor=32.0, original_max_positions=8192),
    tie_embeddings=True,
    max_positions=131_072,
    bos_token_id=128_000,
    eos_token_ids=(128_001, 128_008, 128_009),
  )


def qwen3_0_6b(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of Qwen3-0.6B (Qwen/Qwen3-0.6B), whose heads together are wider than the model."""
  return ModelConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    layers=(layer(mixer),) * 28,
    norm_eps=1e-6,
    rope=RopeConfig(1_000_000.0),
    qk_norm="head",
    tie_embeddings=True,
    max_positions=40_960,
    bos_token_id=151_643,
    eos_token_ids=(151_645, 151_643),
  )


def two_cores(mixer: str | MixerConfig = "softmax") -> ModelConfig:
  """Returns the config of a model of at most 3 million parameters, for a tokenizer of 4,096: it trains on two cores."""
  return ModelConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_heads=3,
    num_kv_heads=3,
    head_dim=64,
    layers=(layer(mixer),) * 4,
    tie_embeddings=True,
    max_positions=512,
    eos_token_ids=(0,),
  )


def tiny(mixer: str | MixerConfig = "supra") -> ModelConfig:
  """Returns the config of a model of two small layers, for tests and dry runs: grouped heads, no power of two."""
  return ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=(layer(mixer),) * 2,
    bos_token_id=1,
    eos_token_ids=(2,),
  )


PRESETS: dict[str, Callable[[str | MixerConfig], ModelConfig]] = {
  preset.__name__: preset
  for preset in (smollm2_135m, mistral_7b, llama2_7b, open_lm_1b, llama_3_2_1b, qwen3_0_6b, two_cores, tiny)
}
