"""Opens a Hugging Face directory: a model of `hf_config.FAMILIES`, or an export of `hf_export` with its own code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights import hf_config, hf_export, mamba, names
from convert_weights.errors import read_json_object
from convert_weights.leaves import check_tensors, make_leaf
from convert_weights.source import Source
from convert_weights.tokenizer_source import generation_file, tokenizer_files
from convert_weights.weights import open_weights
from supra_jax.model.config import ModelConfig

# Old checkpoints store the rotary frequencies. They are ignored: the config determines them.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def config_of(directory: Path, original: Mapping[str, Any]) -> ModelConfig:
  """Returns the config of the model in a directory whose config.json has the contents `original`.

  Raises:
    ConversionError: the model cannot be converted; the message lists all that stands in the way.
  """
  generation_path = directory / "generation_config.json"
  generation = read_json_object(generation_path) if generation_path.exists() else {}
  where = str(directory / "config.json")
  if original.get("model_type") == hf_export.OWN_MODEL_TYPE:
    return hf_export.own_config(original, where)
  read = mamba.model_config if original.get("model_type") == mamba.MODEL_TYPE else hf_config.model_config
  return read(original, generation, where)


def open_huggingface(
  directory: Path,
  original: Mapping[str, Any],
  file: Path | None = None,
  tokenizer: Mapping[str, bytes] | None = None,
) -> Source:
  """Opens a Hugging Face directory and checks all that can be checked without reading the tensors.

  Args:
    directory: directory of the model; generation_config.json is read from it if it exists.
    original: contents of the directory's config.json.
    file: weights file; None finds the weights in the directory.
    tokenizer: file name -> contents of a tokenizer; None reads the tokenizer in the directory.

  Raises:
    ConversionError: the model cannot be converted. Config, tensors and tokenizer are checked in this order, and the
      message lists the problems that the first failing check finds.
  """
  config = config_of(directory, original)
  # With tied embeddings transformers ignores the unembedding, yet some files store it.
  twin = names.HF_UNEMBEDDING if config.tie_embeddings else None
  weight_files, tensors = open_weights(directory, file, twin)
  tensors = {
    mamba.OLD_EMBEDDING.sub(mamba.EMBEDDING, name): tensor
    for name, tensor in tensors.items()
    if not _ROTARY_BUFFER.fullmatch(name)
  }
  parameters = names.parameters(config)
  path = directory if file is None else file
  check_tensors(
    str(path),
    {p.hf: p.source_shape for p in parameters},
    tensors,
    optional={twin: (config.vocab_size, config.hidden_size)} if twin else {},
  )
  leaves = [
    make_leaf(str(path), p, p.hf, tensors, twin=twin if p.path == names.EMBEDDING else None) for p in parameters
  ]
  return Source(
    "huggingface",
    path,
    path.absolute().name,
    config,
    original,
    weight_files,
    tensors,
    leaves,
    tokenizer_files(directory) if tokenizer is None else {**generation_file(directory), **tokenizer},
  )
