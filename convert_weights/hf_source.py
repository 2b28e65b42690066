"""A Hugging Face directory: config.json, one or several safetensors files, a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from convert_weights import hf_config, names
from convert_weights.errors import ConversionError, listing, read_json_object
from convert_weights.safetensors_file import open_safetensors
from convert_weights.source import Leaf, Source, StoredTensor

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Old checkpoints store the rotary frequencies, which follow from the config.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def open_huggingface(directory: Path) -> Source:
  """Opens a directory and checks all that can be checked without reading the tensors.

  Raises:
    ConversionError: what stands in the way, by name.
  """
  config_path, generation_path = directory / "config.json", directory / "generation_config.json"
  original = read_json_object(config_path)
  generation = read_json_object(generation_path) if generation_path.exists() else {}
  config = hf_config.model_config(original, generation, str(config_path))
  weight_files, tensors = _open_weights(directory)
  tensors = {name: tensor for name, tensor in tensors.items() if not _ROTARY_BUFFER.fullmatch(name)}
  parameters = names.parameters(config)
  optional = {names.HF_UNEMBEDDING: (config.vocab_size, config.hidden_size)} if config.tie_embeddings else {}
  names.check_tensors(
    str(directory),
    {p.hf: p.source_shape for p in parameters},
    {name: tensor.shape for name, tensor in tensors.items()},
    optional=optional,
    unreadable=[f"{name}: {tensor.type_name}" for name, tensor in tensors.items() if tensor.dtype is None],
  )
  unembedding = tensors.get(names.HF_UNEMBEDDING) if config.tie_embeddings else None
  leaves = [_leaf(directory, p, tensors[p.hf], unembedding) for p in parameters]
  return Source("huggingface", directory, config, original, weight_files, tensors, leaves, tokenizer_files(directory))


def _leaf(
  directory: Path, parameter: names.Parameter, stored: StoredTensor, tied_unembedding: StoredTensor | None
) -> Leaf:
  twin = tied_unembedding if parameter.hf == names.HF_EMBEDDING else None

  def read() -> np.ndarray:
    array = stored.read()
    if twin is not None and not np.array_equal(twin.read(), array):
      raise ConversionError(
        f"{directory}: tie_word_embeddings is true, but {names.HF_UNEMBEDDING} differs from {parameter.hf}."
      )
    return array.T if parameter.transposed else array

  num_bytes = stored.num_bytes + (twin.num_bytes if twin else 0)
  return Leaf(parameter.path, parameter.shape, parameter.hf, num_bytes, read)


def _open_weights(directory: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
  single, index = directory / _WEIGHTS, directory / _INDEX
  if single.exists() and index.exists():
    raise ConversionError(f"{directory}: holds both {_WEIGHTS} and {_INDEX}; remove the one that is not meant.")
  if single.exists():
    return [single], open_safetensors(single)
  if index.exists():
    return _open_shards(directory, index)
  others = sorted(p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
  raise ConversionError(
    f"{directory}: holds neither {_WEIGHTS} nor {_INDEX}"
    + (f", only {', '.join(others[:20])}; save it as safetensors first." if others else ".")
  )


def _open_shards(directory: Path, index: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
  weight_map = read_json_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
    raise ConversionError(f"{index}: weight_map: wanted an object of tensor name -> file name.")
  shards = sorted(set(weight_map.values()))
  # By name and not by resolved path: the hub's cache holds links to files that lie elsewhere.
  outside = [s for s in shards if Path(s).name != s or s in (".", "..") or "\\" in s]
  if outside:
    raise ConversionError("\n".join([f"{index}: refused.", *listing("files outside its directory", outside)]))
  missing = [s for s in shards if not (directory / s).is_file()]
  if missing:
    raise ConversionError("\n".join([f"{index}: refused.", *listing("missing files", missing)]))
  tensors: dict[str, StoredTensor] = {}
  twice, misplaced = [], []
  for shard in shards:
    found = open_safetensors(directory / shard)
    twice += [f"{name}: again in {shard}" for name in found if name in tensors]
    misplaced += [f"{name}: in {shard}, {weight_map.get(name)} in the index" for name in found
                  if weight_map.get(name) != shard]  # fmt: skip
    tensors.update(found)
  absent = [f"{name}: not in {shard}" for name, shard in weight_map.items() if name not in tensors]
  if twice or misplaced or absent:
    raise ConversionError(
      "\n".join(
        [
          f"{index}: does not describe its files.",
          *listing("tensors in two files", twice),
          *listing("tensors in another file than the index says", misplaced),
          *listing("tensors in no file", absent),
        ]
      )
    )
  return [directory / shard for shard in shards], tensors


def tokenizer_files(directory: Path) -> dict[str, bytes]:
  """File name -> contents of the tokenizer in a directory; empty where there is none."""
  tokenizers = [name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).exists()]
  wanted = [*tokenizers[:1], "tokenizer_config.json"] if tokenizers else []
  return {name: (directory / name).read_bytes() for name in wanted if (directory / name).exists()}
