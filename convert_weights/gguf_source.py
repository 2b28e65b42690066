"""Opens a GGUF model of one of ARCHITECTURES: metadata -> ModelConfig, tensors and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert_weights import gguf_tokenizer, names
from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from convert_weights.gguf_file import GGUFFile
from convert_weights.gguf_parts import open_parts
from convert_weights.gguf_rope import FACTORS, ROPE_KEYS, ROPE_KEYS_OFF_AT_ONE, rope_config
from convert_weights.leaves import check_tensors
from convert_weights.source import Leaf, Source, StoredTensor
from supra_jax.model.config import ModelConfig, QKNorm
from supra_jax.model.mixers.softmax import SoftmaxConfig


class _Architecture(NamedTuple):
  """Properties of a model that follow from its architecture's name.

  Attributes:
    permuted: whether llama.cpp's converter reorders the features of q and k so that RoPE rotates neighbours (2i, 2i+1).
    qk_norm: value of `ModelConfig.qk_norm`.
  """

  permuted: bool = False
  qk_norm: QKNorm = "none"


# Name in `general.architecture` -> its properties. Mistral models have the name llama.
ARCHITECTURES: Mapping[str, _Architecture] = {
  "llama": _Architecture(permuted=True),
  "qwen2": _Architecture(),
  "qwen3": _Architecture(qk_norm="head"),
}
_TRANSLATED = {
  "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
  "attention.causal", "attention.value_length", "block_count", "context_length", "embedding_length",
  "feed_forward_length", "tensor_data_layout", "vocab_size",
}  # fmt: skip
# Number -> keys that converters write although this number turns their feature off.
_OFF_AT = {
  0: {
    "attention.sliding_window",
    "expert_count",
    "expert_used_count",
    "pooling_type",
    "rope.scaling.yarn_log_multiplier",
  },
  1: ROPE_KEYS_OFF_AT_ONE,
}
_ROTARY_BUFFER = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.attn_rot_embd")


def open_gguf_source(path: Path, tokenizer: Mapping[str, bytes] | None = None) -> Source:
  """Opens a GGUF model and checks all that can be checked without reading the tensors.

  Args:
    path: the GGUF file, or any part of a model that gguf-split has split.
    tokenizer: file name -> contents of a tokenizer; None reads the tokenizer in the GGUF file.

  Raises:
    ConversionError: the model cannot be converted. Metadata, tensors and tokenizer are checked in this order, and the
      message lists the problems that the first failing check finds.
  """
  paths, file = open_parts(path)
  config = model_config(file, str(path))
  # The config already includes the factors that divide the rotary frequencies.
  tensors = {n: tensor for n, tensor in file.tensors.items() if n != FACTORS and not _ROTARY_BUFFER.fullmatch(n)}
  parameters = {p.gguf: p for p in names.parameters(config) if p.gguf is not None}
  check_tensors(str(path), {name: p.source_shape for name, p in parameters.items()}, tensors, optional={})
  original = {k: v for k, v in file.metadata.items() if not (k.startswith("tokenizer.") and isinstance(v, list))}
  files = gguf_tokenizer.tokenizer_files(file.metadata, config, str(path)) if tokenizer is None else tokenizer
  permuted = ARCHITECTURES[file.metadata["general.architecture"]].permuted
  leaves = [_leaf(p, name, tensors[name], permuted) for name, p in parameters.items()]
  return Source("gguf", path, path.absolute().name, config, original, paths, tensors, leaves, files)


def _leaf(parameter: names.Parameter, name: str, stored: StoredTensor, permuted: bool) -> Leaf:
  def read() -> np.ndarray:
    array = stored.read()
    if permuted and parameter.rotary_heads:
      array = _unpermute(array, parameter.rotary_heads)
    return array.T if parameter.transposed else array

  return Leaf(parameter.path, parameter.shape, name, stored.num_bytes, read)


def model_config(file: GGUFFile, where: str) -> ModelConfig:
  """Translates the metadata of a GGUF file into a ModelConfig.

  Args:
    file: header of the file. The tensors' names say whether the model has biases and tied embeddings.
    where: name of the file, for messages.

  Raises:
    ConversionError: the file holds no model of one of ARCHITECTURES; some keys are missing or not supported, which the
      message lists; or values contradict each other.
  """
  metadata, tensors = file.metadata, file.tensors
  architecture = metadata.get("general.architecture")
  kind = metadata.get("general.type", "model")
  if kind != "model":
    raise ConversionError(f"{where}: general.type={kind!r}: wanted a model (merge an adapter into its base model).")
  if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
    raise ConversionError(
      f"{where}: general.architecture={architecture!r} is not supported: only {', '.join(ARCHITECTURES)}."
    )
  prefix = f"{architecture}."
  values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
  reader = ConfigReader(values, prefix)
  ids = ConfigReader(metadata)
  off = {key for number, keys in _OFF_AT.items() for key in keys if values.get(key) == number}
  reader.unknown_keys(_TRANSLATED | ROPE_KEYS | off)
  reader.only("attention.causal", True)
  hidden_size, num_heads = reader.required("embedding_length"), reader.required("attention.head_count")
  if hidden_size % num_heads and "attention.key_length" not in values:
    reader.refuse("embedding_length", f"not divisible by {prefix}attention.head_count={num_heads}")
  head_dim = reader.number("attention.key_length", int, hidden_size // num_heads) or 1
  value_head_dim = reader.number("attention.value_length", int, head_dim)
  num_layers = reader.required("block_count")
  if num_layers > len(tensors):
    reader.refuse("block_count", f"more than the file's {len(tensors)} tensors")
    num_layers = 1
  tokens = metadata.get("tokenizer.ggml.tokens")
  if "vocab_size" not in values and isinstance(tokens, list):
    values["vocab_size"] = len(tokens)
  vocab_size = reader.required("vocab_size")
  bos = ids.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
  eos = [ids.token_ids(f"tokenizer.ggml.{name}_token_id", vocab_size) for name in ("eos", "eot")]
  translated = {
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": reader.required("feed_forward_length"),
    "num_heads": num_heads,
    "num_kv_heads": reader.number("attention.head_count_kv", int, num_heads),
    "head_dim": head_dim,
    "value_head_dim": None if value_head_dim == head_dim else value_head_dim,
    "layers": (SoftmaxConfig(),) * num_layers,
    # The file stores a float32. Its shortest decimal, such as 1e-05, is the number in the model's own config.
    "norm_eps": float(str(np.float32(reader.required("attention.layer_norm_rms_epsilon", float)))),
    "tie_embeddings": names.GGUF_UNEMBEDDING not in tensors,
    "qkv_bias": "blk.0.attn_q.bias" in tensors,
    "output_bias": "blk.0.attn_output.bias" in tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    "max_positions": reader.number("context_length", int, None),
    "bos_token_id": bos[0] if bos else None,
    "eos_token_ids": tuple(dict.fromkeys(eos[0] + eos[1])),
    "qk_norm": ARCHITECTURES[architecture].qk_norm,
    "rope": rope_config(reader, head_dim, tensors.get(FACTORS)),
  }
  if reader.refused or ids.refused:
    refused = listing("refused", reader.refused + ids.refused)
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *refused]))
  try:
    return ModelConfig(**translated)
  except ValueError as error:
    raise ConversionError(f"{where}: {error}") from error


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's reordering of rotated features: pairs (2i, 2i+1) back to halves (i, i + K/2)."""
  rows = array.shape[0]
  return array.reshape(heads, rows // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
