"""Safetensors files: reads and checks the header, then reads tensors one at a time, bfloat16 included.

The `safetensors` package is not used: in the versions we support it cannot read bfloat16 into numpy, and its errors do
not name the file.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.errors import ConversionError
from convert_weights.source import BFLOAT16, StoredTensor, read_array

# The format's own limit. A file that claims a longer header is corrupt, and must not make us read gigabytes.
MAX_HEADER_BYTES = 100_000_000

_FLOAT_TYPES: dict[str, np.dtype] = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": BFLOAT16,
}
_ITEM_BITS = {
  "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
  "U16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
  """Reads and checks the header of one safetensors file.

  Returns:
    Name -> tensor, in the order of their data in the file.

  Raises:
    ConversionError: the file is missing, truncated or too long, or its header is corrupt or has an unknown dtype.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      header_bytes = int.from_bytes(file.read(8), "little")
      if size < 8 or not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise ConversionError(f"{path}: not a safetensors file: its header claims {header_bytes} bytes.")
      raw = file.read(header_bytes)
  except OSError as error:
    raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from error
  if len(raw) < header_bytes:
    raise ConversionError(f"{path}: truncated inside its header: {size} bytes of {8 + header_bytes}.")
  header = _parse_header(path, raw)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise ConversionError(f"{path}: corrupt header: __metadata__: wanted an object of strings.")
  tensors: dict[str, StoredTensor] = {}
  end = 0
  for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
    begin, tensor_end = _offsets(path, name, entry)
    # The format allows neither gaps nor overlaps: they reveal a damaged or crafted header.
    if begin != end:
      raise ConversionError(f"{path}: corrupt header: {name} starts at byte {begin}, not at byte {end}.")
    end = tensor_end
    tensors[name] = _stored_tensor(path, name, entry, begin, tensor_end, 8 + header_bytes)
  if size != 8 + header_bytes + end:
    problem = "truncated" if size < 8 + header_bytes + end else "longer than its header says"
    raise ConversionError(f"{path}: {problem}: {size} bytes, the header describes {8 + header_bytes + end}.")
  return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) != len(keys) else []
    if twice:
      raise ConversionError(f"{path}: corrupt header: {', '.join(twice)} given twice.")
    return dict(pairs)

  try:
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ConversionError(f"{path}: corrupt header: {error}.") from error
  if not isinstance(header, dict):
    raise ConversionError(f"{path}: corrupt header: wanted a JSON object.")
  return header


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
  offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
  if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)) and offsets[0] <= offsets[1]):
    raise ConversionError(f"{path}: corrupt header: {name} has data_offsets {offsets!r}.")
  return offsets[0], offsets[1]


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], begin: int, end: int, base: int) -> StoredTensor:
  shape, type_name = entry.get("shape"), entry.get("dtype")
  if not (isinstance(shape, list) and all(map(_is_size, shape))):
    raise ConversionError(f"{path}: corrupt header: {name} has shape {shape!r}.")
  if not isinstance(type_name, str) or type_name not in _ITEM_BITS:
    raise ConversionError(f"{path}: {name} has the unknown dtype {type_name!r}.")
  bits = math.prod(shape) * _ITEM_BITS[type_name]
  if bits != 8 * (end - begin):
    raise ConversionError(f"{path}: corrupt header: {name} {type_name} {shape} does not fill its {end - begin} bytes.")
  dtype = _FLOAT_TYPES.get(type_name)
  read_rows = functools.partial(_read_rows, path, name, base + begin, tuple(shape), dtype)
  return StoredTensor(tuple(shape), type_name, dtype, end - begin, read_rows)


def _read_rows(
  path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype | None, first: int, last: int
) -> np.ndarray:
  assert dtype is not None, "check_tensors refuses types that cannot be read"
  row = math.prod(shape[1:])
  array = read_array(path, name, dtype, (last - first) * row, offset + first * row * dtype.itemsize)
  return array.reshape(last - first, *shape[1:])
