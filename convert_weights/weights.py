"""Opens the weights of a directory: one file, or several with an index, in safetensors or PyTorch's format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from convert_weights.errors import ConversionError, listing, read_json_object
from convert_weights.safetensors_file import open_safetensors
from convert_weights.source import StoredTensor
from convert_weights.torch_file import open_torch

# File name -> function that opens it, in order of preference, which is that of transformers.
_NAMES: Mapping[str, Callable[[Path], dict[str, StoredTensor]]] = {
  "model.safetensors": open_safetensors,
  "pytorch_model.bin": open_torch,
}
# Suffix -> function that opens a weights file of any name.
_SUFFIXES: Mapping[str, Callable[[Path], dict[str, StoredTensor]]] = {
  ".safetensors": open_safetensors,
  ".bin": open_torch,
  ".pt": open_torch,
  ".pth": open_torch,
}
WEIGHT_SUFFIXES = tuple(_SUFFIXES)
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = re.compile(r"adapter_(config\.json|model\..+)")
_NATIVE = re.compile(r"consolidated[.-].+")


def has_weights(names: Collection[str]) -> bool:
  """Whether any of a directory's file names is that of safetensors or PyTorch weights.

  Original files of Meta and Mistral (`consolidated.*`), and .bin files that transformers would not read, do not count.
  """
  others = [name for name in names if name.endswith((".safetensors", ".pt", ".pth")) and not _NATIVE.fullmatch(name)]
  return bool(others) or _have_names_of_transformers(names)


def _have_names_of_transformers(names: Collection[str]) -> bool:
  return any(name.removesuffix(".index.json") in _NAMES for name in names)


def refuse_other_forms(where: object, names: Collection[str]) -> None:
  """Refuses LoRA adapters, and weights in Meta's or Mistral's original format.

  Args:
    where: name of the source, for messages.
    names: names of the files of the source, or of the one file that was given.

  Raises:
    ConversionError: the files hold an adapter, or only original weights; the message says what to convert instead.
  """
  adapter = ", ".join(sorted(filter(_ADAPTER.fullmatch, names)))
  merge = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
  if adapter and _have_names_of_transformers(names):
    raise ConversionError(
      f"{where}: holds a LoRA adapter ({adapter}) beside the model, and transformers would load both: {merge}, or take "
      "the adapter's files away to convert the model without it."
    )
  if adapter:
    raise ConversionError(f"{where}: holds a LoRA adapter ({adapter}) and no model: {merge} and convert that.")
  native = sorted(filter(_NATIVE.fullmatch, names))
  if native and not _have_names_of_transformers(names) and not any(name.endswith(".gguf") for name in names):
    raise ConversionError(
      f"{where}: holds the original form of Meta's and Mistral's models ({', '.join(native[:3])}, params.json): take "
      "the model in transformers' form, with config.json and model*.safetensors; on the hub its name often ends in -hf."
    )


def open_weights(
  directory: Path, file: Path | None = None, optional: str | None = None
) -> tuple[list[Path], dict[str, StoredTensor]]:
  """Opens the weights of a directory.

  Args:
    directory: directory to search for weights.
    file: weights file to open, with a suffix of WEIGHT_SUFFIXES; None searches the directory.
    optional: name of a tensor that an index may name though no file has it: a tied unembedding.

  Returns:
    The paths of the weights files, and name -> tensor of all their tensors.

  Raises:
    ConversionError: the directory holds no weights, or several and nothing says which to take; a file is missing,
      corrupt or contradicts its index.
  """
  if file is not None:
    return [file], _SUFFIXES[file.suffix](file)
  for name, open_file in _NAMES.items():
    single, index = directory / name, directory / f"{name}.index.json"
    if single.exists() and index.exists():
      raise ConversionError(f"{directory}: holds both {name} and {index.name}; remove one of the two.")
    if single.exists():
      return [single], open_file(single)
    if index.exists():
      return _open_shards(directory, index, open_file, optional)
  others = sorted(p.name for p in directory.iterdir() if p.suffix in _SUFFIXES)
  checkpoints = [name for name in others if name.endswith((".pt", ".pth"))]
  if len(checkpoints) == 1:
    return [directory / checkpoints[0]], open_torch(directory / checkpoints[0])
  raise ConversionError(
    f"{directory}: wanted {' or '.join(_NAMES)}, each also in parts with an index, or a single .pt file"
    + (f"; it holds {', '.join(others[:20])}. Give one of these files." if others else ".")
  )


def _open_shards(
  directory: Path, index: Path, open_file: Callable[[Path], dict[str, StoredTensor]], optional: str | None
) -> tuple[list[Path], dict[str, StoredTensor]]:
  weight_map = read_json_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
    raise ConversionError(f"{index}: weight_map: wanted an object of tensor name -> file name.")
  shards = sorted(set(weight_map.values()))
  # Checks names, not resolved paths: in the hub's cache, files are links that lead out of the directory.
  outside = [s for s in shards if Path(s).name != s or s in ("", "..") or "\\" in s]
  if outside:
    raise ConversionError("\n".join([f"{index}: refused.", *listing("files outside its directory", outside)]))
  missing = [s for s in shards if not os.path.isfile(directory / s)]
  if missing:
    raise ConversionError("\n".join([f"{index}: refused.", *listing("missing files", missing)]))
  tensors: dict[str, StoredTensor] = {}
  twice, misplaced = [], []
  for shard in shards:
    found = open_file(directory / shard)
    twice += [f"{name}: again in {shard}" for name in found if name in tensors]
    misplaced += [f"{name}: in {shard}, {weight_map.get(name)} in the index" for name in found
                  if weight_map.get(name) != shard]  # fmt: skip
    tensors.update(found)
  absent = [f"{name}: not in {shard}" for name, shard in weight_map.items() if name not in {*tensors, optional}]
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
