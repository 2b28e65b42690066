"""PyTorch files (`torch.save`): checks the archive, then reads tensors one at a time.

The file is a zip archive that holds a pickle, which describes the tensors, and one record for each storage. torch reads
the pickle with `weights_only=True`, so that no code in it can run, and creates the tensors on its "meta" device: they
know their offset in the file, but have no data. The data are then read from that offset. The file is never
memory-mapped, because mapped pages would count as memory used.
"""

from __future__ import annotations

import functools
import math
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.errors import ConversionError, listing
from convert_weights.source import BFLOAT16, StoredTensor, read_array

# Ten times the size of the pickle that describes a large model and its optimizer.
_MAX_PICKLE_BYTES = 20_000_000
# Names that a pickle of tensors needs. torch's own list also allows constructors such as `bytearray`, with which a
# pickle of 20 bytes can ask for gigabytes.
_NAMES = re.compile(
  r"collections (OrderedDict|defaultdict|Counter)|torch (?!Untyped)\w+Storage|torch (Size|device|[a-z]\w*)|"
  r"torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter|"
  r"torch\.serialization _get_layout"
)
_LOCAL_HEADER_BYTES = 30
# Limit on `_visits`: hashing, comparing or freeing an object visits all objects inside it, repeated ones every time.
_MAX_VISITS = 500_000_000


def open_torch(path: Path) -> dict[str, StoredTensor]:
  """Reads and checks a file of `torch.save`: a state dict, or a training checkpoint that has one as `state_dict`.

  Returns:
    Name -> tensor, whose data are not read yet.

  Raises:
    ConversionError: torch is not installed, or too old; the file is missing, truncated, corrupt, big-endian or in the
      format used before PyTorch 1.6; its pickle needs more than tensors or is too large; it holds no state dict.
  """
  try:
    import torch
  except ImportError as error:
    raise ConversionError(f"{path}: reading it needs torch: pip install 'supra_jax[torch]'.") from error
  records = _records(path)
  try:
    with warnings.catch_warnings(action="ignore"):  # users can do nothing about these warnings
      loaded = torch.load(path, map_location="meta", weights_only=True)
  except Exception as error:  # a damaged or hostile pickle makes torch raise errors of many types
    raise ConversionError(f"{path}: torch refuses it: {_reason(error)}.") from error
  state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
  if not isinstance(state, dict) or not state:
    raise ConversionError(f"{path}: holds no state dict, a dict of tensor name -> tensor.")
  others = [str(name)[:200] for name, value in state.items() if type(name) is not str or not torch.is_tensor(value)]
  if others:
    raise ConversionError(
      "\n".join([f"{path}: wanted a dict of tensor name -> tensor.", *listing("other entries", others)])
    )
  dtypes = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: BFLOAT16}
  return {
    name: _stored_tensor(
      path, name, tensor, dtypes.get(tensor.dtype) if tensor.layout == torch.strided else None, records
    )
    for name, tensor in state.items()
  }


def _records(path: Path) -> dict[int, int]:
  """Returns offset in the archive -> size of the data of each record, in bytes. Also checks the archive's pickle.

  Raises:
    ConversionError: the archive is damaged, big-endian or not of torch's form, or its pickle is refused.
  """
  records: dict[int, int] = {}
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      size = file.seek(0, 2)
      for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
          raise ConversionError(f"{path}: corrupt: the record {info.filename} is compressed, which torch never does.")
        if info.filename.endswith("/data.pkl"):
          _check_pickle(path, archive, info)
        if info.filename.endswith("/byteorder") and archive.open(info).read(10) != b"little":
          raise ConversionError(f"{path}: big-endian numbers are not supported.")
        file.seek(info.header_offset)
        begin = info.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack("<26xHH", file.read(_LOCAL_HEADER_BYTES)))
        if begin + info.file_size > size:
          raise ConversionError(
            f"{path}: truncated: {info.filename} ends at byte {begin + info.file_size}, the file at {size}."
          )
        records[begin] = info.file_size
  except ConversionError:
    raise
  except OSError as error:
    raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from error
  except Exception as error:  # a damaged archive makes zipfile and pickletools raise errors of many types
    raise ConversionError(
      f"{path}: truncated, corrupt, or not of the form that torch.save writes since PyTorch 1.6: {error}."
    ) from error
  end = 0
  for begin, count in sorted(records.items()):
    if begin < end:
      raise ConversionError(f"{path}: corrupt: records that overlap at byte {begin}.")
    end = begin + count
  return records


def _check_pickle(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
  """Raises ConversionError if the pickle is too large, names more than tensors, or would take hours to load."""
  if info.file_size > _MAX_PICKLE_BYTES:
    raise ConversionError(f"{path}: corrupt: its pickle claims {info.file_size} bytes.")
  raw = archive.read(info)
  named = [str(argument) for opcode, argument, _ in pickletools.genops(raw) if opcode.name == "GLOBAL"]
  others = sorted({name[:200] for name in named if not _NAMES.fullmatch(name)})
  if others:
    raise ConversionError(
      "\n".join([f"{path}: its pickle needs more than tensors, and could run code.", *listing("names", others)])
    )
  if _visits(raw) > _MAX_VISITS:
    raise ConversionError(f"{path}: its pickle repeats objects within objects; loading it would take hours.")


def _visits(raw: bytes) -> int:
  """Returns the total number of objects visited if each opcode of a pickle visits all objects inside its operands.

  The number can be exponential in the pickle's size: if x_n is the tuple (x_(n-1), x_(n-1)), hashing it visits 2^n
  objects.
  """
  stack: list[int | None] = []  # for each object, the number of objects in it, itself included; None is a mark
  memo: dict[Any, int | None] = {}
  visits = 0
  for opcode, argument, _ in pickletools.genops(raw):
    if opcode.name == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif opcode.name.endswith("PUT"):
      memo[argument] = stack[-1]
    elif opcode.name.endswith("GET"):
      stack.append(memo[argument])
    else:
      taken, before = [], opcode.stack_before
      if pickletools.markobject in before:
        while (size := stack.pop()) is not None:
          taken.append(size)
        before = before[: before.index(pickletools.markobject)]
      taken += [stack.pop() or 0 for _ in before]
      visits += sum(taken)
      stack += [None if made is pickletools.markobject else 1 + sum(taken) for made in opcode.stack_after]
  return visits


def _reason(error: Exception) -> str:
  """Returns the useful line of a message of torch.load; the first lines advise to turn `weights_only` off."""
  text = str(error)
  named = re.search(r"WeightsUnpickler error: (.*)|(.*TorchScript.*)", text)
  return (named[0] if named else text or type(error).__name__).splitlines()[0].removesuffix(".")


def _stored_tensor(path: Path, name: str, tensor: Any, dtype: Any, records: Mapping[int, int]) -> StoredTensor:
  shape, type_name = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
  if dtype is None:
    layout = str(tensor.layout).removeprefix("torch.")
    return StoredTensor(shape, f"{layout} {type_name}", None, 0, lambda first, last: np.empty(0))
  dtype = np.dtype(dtype)
  storage = tensor.untyped_storage()
  begin = getattr(storage, "_checkpoint_offset", None)
  if begin is None:
    raise ConversionError(
      f"{path}: this version of torch does not report where a tensor is in the file: pip install 'torch>=2.13'."
    )
  if records.get(begin) != storage.nbytes():
    raise ConversionError(
      f"{path}: corrupt: {name} claims a record of {storage.nbytes()} bytes at byte {begin}, and there is none."
    )
  strides, first_item = tensor.stride(), tensor.storage_offset()
  items = first_item + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
  # The second check is for strides of 0, which can turn one number into terabytes.
  if math.prod(shape) and (items > storage.nbytes() // dtype.itemsize or math.prod(shape) > items - first_item):
    raise ConversionError(f"{path}: corrupt: {name} {list(shape)} does not lie within its {storage.nbytes()} bytes.")
  read_rows = functools.partial(_read_rows, path, name, begin + first_item * dtype.itemsize, shape, strides, dtype)
  return StoredTensor(shape, type_name, dtype, math.prod(shape) * dtype.itemsize, read_rows)


def _read_rows(
  path: Path,
  name: str,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
  dtype: np.dtype,
  first: int,
  last: int,
) -> np.ndarray:
  shape, strides = (last - first, *shape[1:]), strides or (1,)
  items = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 if math.prod(shape) else 0
  raw = read_array(path, name, dtype, items, offset + first * strides[0] * dtype.itemsize)
  steps = tuple(stride * dtype.itemsize for stride in strides)
  return np.lib.stride_tricks.as_strided(raw, shape, steps, writeable=False)
