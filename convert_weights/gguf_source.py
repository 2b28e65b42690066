"""A GGUF file of the llama architecture: metadata -> ModelConfig, tensors, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from convert_weights import gguf_tokenizer, names
from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from convert_weights.gguf_file import GGUFFile, open_gguf
from convert_weights.leaves import check_tensors
from convert_weights.source import Leaf, Source, StoredTensor
from supra_jax.config import ModelConfig, RopeConfig

_TRANSLATED = {
  "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
  "attention.value_length", "block_count", "context_length", "embedding_length",
  "feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor",
  "rope.scaling.type", "vocab_size",
}  # fmt: skip
# Zero switches these off, and converters write the zero.
_OFF_AT_ZERO = {"attention.sliding_window", "expert_count", "expert_used_count"}
_ROTARY_BUFFER = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.attn_rot_embd")
_DEFAULT_ROPE_BASE = 10_000.0


def open_gguf_source(path: Path) -> Source:
  """Opens a GGUF file and checks all that can be checked without reading the tensors.

  Raises:
    ConversionError: what stands in the way, by name.
  """
  file = open_gguf(path)
  config = model_config(file, str(path))
  tensors = {name: tensor for name, tensor in file.tensors.items() if not _ROTARY_BUFFER.fullmatch(name)}
  parameters = {p.gguf: p for p in names.parameters(config) if p.gguf is not None}
  check_tensors(str(path), {name: p.source_shape for name, p in parameters.items()}, tensors, optional={})
  original = {k: v for k, v in file.metadata.items() if not (k.startswith("tokenizer.") and isinstance(v, list))}
  tokenizer_files = gguf_tokenizer.tokenizer_files(file.metadata, config, str(path))
  leaves = [_leaf(p, name, tensors[name]) for name, p in parameters.items()]
  return Source("gguf", path, path.absolute().name, config, original, [path], tensors, leaves, tokenizer_files)


def _leaf(parameter: names.Parameter, name: str, stored: StoredTensor) -> Leaf:
  def read() -> np.ndarray:
    array = stored.read()
    if parameter.rotary_heads:
      array = _unpermute(array, parameter.rotary_heads)
    return array.T if parameter.transposed else array

  return Leaf(parameter.path, parameter.shape, name, stored.num_bytes, read)


def model_config(file: GGUFFile, where: str) -> ModelConfig:
  """Translates the metadata.

  Raises:
    ConversionError: something in it is not supported or missing; all of it is listed.
  """
  metadata, tensors = file.metadata, file.tensors
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise ConversionError(f"{where}: general.architecture={architecture!r} is not supported: only 'llama'.")
  if metadata.get("split.count", 1) != 1:
    raise ConversionError(f"{where}: split.count={metadata['split.count']}: merge the parts with gguf-split first.")
  values = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
  reader = ConfigReader(values, "llama.")
  ids = ConfigReader(metadata)
  if "rope_freqs.weight" in tensors:
    ids.refuse("rope_freqs.weight", "llama3 scaling without its settings; convert the Hugging Face directory instead")
  reader.unknown_keys(_TRANSLATED | {key for key in _OFF_AT_ZERO if values.get(key) == 0})
  hidden_size, num_heads = reader.required("embedding_length"), reader.required("attention.head_count")
  if hidden_size % num_heads and "attention.key_length" not in values:
    reader.refuse("embedding_length", f"not divisible by llama.attention.head_count={num_heads}")
  head_dim = reader.number("attention.key_length", int, hidden_size // num_heads)
  value_head_dim = reader.number("attention.value_length", int, head_dim)
  reader.only("rope.dimension_count", head_dim)
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
    "mixers": ("softmax",) * num_layers,
    # The file holds a float32; its shortest decimal is what the model's author wrote.
    "norm_eps": float(str(np.float32(reader.required("attention.layer_norm_rms_epsilon", float)))),
    "tie_embeddings": names.GGUF_UNEMBEDDING not in tensors,
    "qkv_bias": "blk.0.attn_q.bias" in tensors,
    "output_bias": "blk.0.attn_output.bias" in tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    "max_positions": reader.number("context_length", int, None),
    "bos_token_id": bos[0] if bos else None,
    "eos_token_ids": tuple(dict.fromkeys(eos[0] + eos[1])),
    "rope": _rope(reader),
  }
  if reader.refused or ids.refused:
    refused = listing("refused", reader.refused + ids.refused)
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *refused]))
  try:
    return ModelConfig(**translated)
  except ValueError as error:
    raise ConversionError(f"{where}: {error}") from error


def _rope(reader: ConfigReader) -> RopeConfig:
  reader.only("rope.scaling.type", "none", "linear")
  base = reader.number("rope.freq_base", float, _DEFAULT_ROPE_BASE) or _DEFAULT_ROPE_BASE
  factor = reader.number("rope.scaling.factor", float, reader.number("rope.scale_linear", float, 1.0)) or 1.0
  # A factor without a type is linear, as in llama.cpp.
  if factor == 1.0 or reader.values.get("rope.scaling.type") == "none":
    return RopeConfig(base)
  return RopeConfig(base, "linear", factor)


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's reordering of rotated features: pairs (2i, 2i+1) back to halves (i, i + K/2)."""
  rows = array.shape[0]
  return array.reshape(heads, rows // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
