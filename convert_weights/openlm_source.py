"""Opens a directory of OpenLM, the paper's code: config.json with model_type `openlm`, and weights in any form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights import names, openlm_config
from convert_weights.errors import ConversionError, listing
from convert_weights.leaves import check_tensors, make_leaf
from convert_weights.source import Source, StoredTensor
from convert_weights.tokenizer_source import generation_file, tokenizer_files
from convert_weights.weights import open_weights

# Prefixes that wrappers of a model put before the names of its tensors: transformers, data parallelism, torch.compile.
_PREFIX = re.compile(r"^((model|module|_orig_mod)\.)+")
# Old checkpoints store the rotary frequencies. They are ignored: the config determines them.
_ROTARY_BUFFER = re.compile(r"layers\.\d+\.attention\.pos_embed\.inv_freq")


def open_openlm(
  directory: Path,
  original: Mapping[str, Any],
  file: Path | None = None,
  tokenizer: Mapping[str, bytes] | None = None,
) -> Source:
  """Opens an OpenLM directory and checks all that can be checked without reading the tensors.

  Args:
    directory: directory of the model; generation_config.json is read from it if it exists.
    original: contents of the directory's config.json.
    file: weights file; None finds the weights in the directory.
    tokenizer: file name -> contents of a tokenizer; None reads the tokenizer in the directory.

  Raises:
    ConversionError: the model cannot be converted. Config, tensors and tokenizer are checked in this order, and the
      message lists the problems that the first failing check finds.
  """
  config = openlm_config.model_config(original, str(directory / "config.json"))
  weight_files, found = open_weights(directory, file)
  path = directory if file is None else file
  tensors = _without_prefix(found, path)
  twin = names.OPENLM_UNEMBEDDING if config.tie_embeddings else None
  if twin in tensors and names.OPENLM_EMBEDDING not in tensors:
    # safetensors stores tied embeddings under only one of their two names, either one.
    tensors[names.OPENLM_EMBEDDING] = tensors.pop(twin)
  parameters = names.parameters(config)
  wanted = names.openlm_shapes(parameters)
  check_tensors(str(path), wanted, tensors, optional={twin: wanted[names.OPENLM_EMBEDDING]} if twin else {})
  leaves = [
    make_leaf(
      str(path), p, p.openlm, tensors, first_row=p.openlm_row, twin=twin if p.openlm == names.OPENLM_EMBEDDING else None
    )
    for p in parameters
    if p.openlm is not None
  ]
  files = tokenizer_files(directory) if tokenizer is None else {**generation_file(directory), **tokenizer}
  return Source("openlm", path, path.absolute().name, config, original, weight_files, tensors, leaves, files)


def _without_prefix(found: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
  tensors: dict[str, StoredTensor] = {}
  twice = []
  for name, tensor in found.items():
    short = _PREFIX.sub("", name)
    if short in tensors:
      twice.append(short)
    elif not _ROTARY_BUFFER.fullmatch(short):
      tensors[short] = tensor
  if twice:
    raise ConversionError("\n".join([f"{path}: refused.", *listing("tensors with and without a prefix", twice)]))
  return tensors
