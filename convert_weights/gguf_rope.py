"""RoPE settings in the metadata and tensors of a GGUF file -> RopeConfig."""

from __future__ import annotations

import itertools

import numpy as np

from convert_weights.config_reader import ConfigReader
from convert_weights.source import StoredTensor
from supra_jax.model.config import RopeConfig, yarn_attention_factor
from supra_jax.model.rope import rope_frequencies

FACTORS = "rope_freqs.weight"
ROPE_KEYS = {
  "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.finetuned",
  "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
  "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Keys that converters write and that change nothing if their value is 1, llama.cpp's default.
ROPE_KEYS_OFF_AT_ONE = {
  "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor",
}  # fmt: skip
_DEFAULT_BASE = 10_000.0
# Published llama3 settings: factor 8 in Llama 3.1 and 3.3, factor 32 in Llama 3.2.
_LLAMA_3_FACTORS, _LLAMA_3_CONTEXT = (8.0, 32.0), 8192
# Relative tolerance, multiplied by the scaling factor. llama.cpp's converter blends frequencies in float32, and the
# blend's rounding error grows with the factor.
_TOLERANCE = 1e-5


def rope_config(reader: ConfigReader, head_dim: int, factors: StoredTensor | None) -> RopeConfig:
  """Reads the RoPE settings of a GGUF file. Complaints are appended to `reader.refused`.

  Args:
    reader: reader of the architecture's metadata, whose prefix (such as `llama.`) is removed from the keys.
    head_dim: number of features of a head; all of them are rotated.
    factors: the tensor FACTORS, [head_dim / 2], divisors of the frequencies; None if the file has none.
  """
  values = reader.values
  reader.only("rope.dimension_count", head_dim)
  reader.only("rope.scaling.type", "none", "linear", "yarn")
  base = reader.number("rope.freq_base", float, _DEFAULT_BASE) or _DEFAULT_BASE
  factor = reader.number("rope.scaling.factor", float, reader.number("rope.scale_linear", float, 1.0)) or 1.0
  original = reader.number("rope.scaling.original_context_length", int, None)
  kind = values.get("rope.scaling.type")
  if factors is not None:
    if kind in (None, "none") or factor == 1.0:
      return _from_factors(reader, base, head_dim, factors, factor, original)
    reader.refuse("rope.scaling.type", f"not supported together with the factors of {FACTORS}")
  if factor == 1.0 or kind == "none":
    return RopeConfig(base)
  if kind != "yarn":  # a factor without a type is linear, as in llama.cpp
    return RopeConfig(base, "linear", factor)
  if original is None:
    original = reader.required("context_length")
  try:
    return RopeConfig(
      base,
      "yarn",
      factor,
      original_max_positions=original,
      beta_fast=reader.number("rope.scaling.yarn_beta_fast", float, RopeConfig.beta_fast) or 1.0,
      beta_slow=reader.number("rope.scaling.yarn_beta_slow", float, RopeConfig.beta_slow) or 1.0,
      attention_factor=yarn_attention_factor(factor),
    )
  except ValueError as error:
    reader.refused.append(str(error))
    return RopeConfig(base)


def _from_factors(
  reader: ConfigReader, base: float, head_dim: int, tensor: StoredTensor, factor: float, original: int | None
) -> RopeConfig:
  """Finds the RoPE settings that give the stored factors: no scaling, or llama3 scaling.

  Tries llama3 scaling with Llama 3's published settings and with the file's own. If none gives the factors, records a
  complaint and returns RoPE without scaling.

  Args:
    reader: reader whose `refused` collects complaints.
    base: base of the rotary frequencies.
    head_dim: number of features of a head.
    tensor: the tensor FACTORS.
    factor: the file's scaling factor; 1 if the file has none.
    original: the file's original context length, in tokens; None if the file has none.
  """
  plain = RopeConfig(base)
  pairs = -(-head_dim // 2)
  if tensor.shape != (pairs,) or tensor.dtype is None:
    reader.refused.append(f"{FACTORS}: wanted {pairs} factors, got {tensor.type_name} {list(tensor.shape)}")
    return plain
  frequencies = rope_frequencies(plain, head_dim)
  found = tensor.read().astype(np.float64)
  candidates = [plain] + [
    RopeConfig(base, "llama3", divisor, original_max_positions=context)
    for divisor, context in itertools.product((*_LLAMA_3_FACTORS, factor), {_LLAMA_3_CONTEXT, original})
    if context is not None and divisor > 1
  ]
  for candidate in candidates:
    slowed = rope_frequencies(candidate, head_dim) * found
    if np.allclose(slowed, frequencies, rtol=_TOLERANCE * candidate.factor, atol=0):
      return candidate
  reader.refused.append(
    f"{FACTORS}: these divide the frequencies by {np.array2string(found, precision=4, threshold=8)}, which is no "
    "llama3 scaling with Llama 3's settings (factor 8 or 32, 8192 positions) or the file's own. Convert the model's "
    "Hugging Face directory, whose config names them"
  )
  return plain
