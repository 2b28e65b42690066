"""GGUF files: reads and checks the header, then reads and dequantises tensors one at a time.

Only the dequantisation of the `gguf` package is used: its reader trusts the counts in a damaged file, and can loop
without end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from convert_weights.errors import ConversionError
from convert_weights.source import BFLOAT16, StoredTensor, read_array

_SUPPORTED_VERSIONS = (2, 3)
# Real headers have up to 10 MB. The Python lists of a much larger one would fill the memory.
_MAX_HEADER_BYTES = 100_000_000
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DIRECT: Mapping[GGMLQuantizationType, np.dtype] = {
  GGMLQuantizationType.F32: np.dtype("<f4"),
  GGMLQuantizationType.F16: np.dtype("<f2"),
  GGMLQuantizationType.BF16: BFLOAT16,
  GGMLQuantizationType.F64: np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """The header of a GGUF file.

  Attributes:
    metadata: key -> number, string, bool or list of these.
    tensors: name -> tensor, whose shape is in numpy's order (GGUF's reversed).
  """

  metadata: Mapping[str, Any]
  tensors: Mapping[str, StoredTensor]


class _Cursor:
  """Reads little-endian values, and raises ConversionError beyond the file's end or _MAX_HEADER_BYTES."""

  def __init__(self, path: Path, file: BinaryIO):
    self.path, self.file = path, file
    self.size = path.stat().st_size
    self.taken = 0

  def take(self, count: int) -> bytes:
    left = min(self.size, _MAX_HEADER_BYTES) - self.taken
    if count > left:
      raise ConversionError(f"{self.path}: truncated or corrupt header: {count} bytes wanted, {left} left.")
    self.taken += count
    return self.file.read(count)

  def scalar(self, code: str) -> Any:
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def string(self) -> str:
    raw = self.take(self.scalar("Q"))
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ConversionError(f"{self.path}: corrupt header: a string is not UTF-8: {raw[:40]!r}.") from error

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.scalar(_SCALARS[kind])
    if kind != _ARRAY:
      raise ConversionError(f"{self.path}: corrupt header: unknown value type {kind}.")
    item_kind, count = self.scalar("I"), self.scalar("Q")
    if item_kind in _SCALARS:
      code = _SCALARS[item_kind]
      return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
    return [self.value(item_kind) for _ in range(count)]


def open_gguf(path: Path) -> GGUFFile:
  """Reads and checks the header of a GGUF file.

  Raises:
    ConversionError: the file is missing, truncated, corrupt, big-endian or of an unsupported version, or one of its
      tensors has an unknown type.
  """
  try:
    with path.open("rb") as file:
      return _read_header(path, _Cursor(path, file))
  except OSError as error:
    raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from error
  except RecursionError as error:
    raise ConversionError(f"{path}: corrupt header: lists within lists, nested too deeply.") from error


def _read_header(path: Path, cursor: _Cursor) -> GGUFFile:
  magic = cursor.take(min(4, cursor.size))
  if magic != b"GGUF":
    raise ConversionError(f"{path}: not a GGUF file: it starts with {magic!r}.")
  version = cursor.scalar("I")
  if version not in _SUPPORTED_VERSIONS:
    big_endian = " (a big-endian file)" if version & 0xFFFF == 0 else ""
    raise ConversionError(f"{path}: GGUF version {version}{big_endian}: only versions 2 and 3 are supported.")
  tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
  metadata: dict[str, Any] = {}
  for _ in range(metadata_count):
    key = cursor.string()
    if key in metadata:
      raise ConversionError(f"{path}: corrupt header: {key} given twice.")
    metadata[key] = cursor.value(cursor.scalar("I"))
  entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
  for _ in range(tensor_count):
    name, dims = cursor.string(), cursor.scalar("I")
    if name in entries:
      raise ConversionError(f"{path}: corrupt header: {name} given twice.")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
    entries[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
  alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
    raise ConversionError(f"{path}: general.alignment={alignment!r}: wanted a positive multiple of 8.")
  base = cursor.taken + -cursor.taken % alignment
  tensors = {name: _stored_tensor(path, name, *entry, base, cursor.size) for name, entry in entries.items()}
  return GGUFFile(metadata, tensors)


def _stored_tensor(
  path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int, base: int, file_bytes: int
) -> StoredTensor:
  try:
    kind = GGMLQuantizationType(type_id)
  except ValueError as error:
    raise ConversionError(f"{path}: {name} has the unknown tensor type {type_id}.") from error
  block, block_bytes = GGML_QUANT_SIZES[kind]
  if not shape or shape[-1] % block:
    raise ConversionError(f"{path}: corrupt header: {name} {list(shape)} is no whole number of {kind.name} blocks.")
  num_bytes = math.prod(shape) // block * block_bytes
  if base + offset + num_bytes > file_bytes:
    raise ConversionError(
      f"{path}: truncated: {name} ends at byte {base + offset + num_bytes}, the file at {file_bytes}."
    )
  dtype = _DIRECT.get(kind, np.dtype(np.float32) if _can_dequantise(kind) else None)
  row_bytes = shape[-1] // block * block_bytes
  read_rows = functools.partial(_read_rows, path, name, base + offset, shape, kind, row_bytes)
  return StoredTensor(shape, kind.name, dtype, num_bytes, read_rows)


@functools.cache
def _can_dequantise(kind: GGMLQuantizationType) -> bool:
  try:
    dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _read_rows(
  path: Path,
  name: str,
  offset: int,
  shape: tuple[int, ...],
  kind: GGMLQuantizationType,
  row_bytes: int,
  first: int,
  last: int,
) -> np.ndarray:
  # Quantised blocks lie along the last axis. A vector is a single row of blocks, read whole and cut afterwards.
  lead = (last - first, *shape[1:-1]) if len(shape) > 1 else ()
  skipped = first * math.prod(shape[1:-1]) * row_bytes if len(shape) > 1 else 0
  raw = read_array(path, name, np.dtype(np.uint8), math.prod(lead) * row_bytes, offset + skipped)
  if kind in _DIRECT:
    array = raw.view(_DIRECT[kind])
  else:
    array = dequantize(raw.reshape(*lead, row_bytes), kind).astype(np.float32, copy=False)
  array = array.reshape(*lead, shape[-1])
  return array if lead else array[first:last]
