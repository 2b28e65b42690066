"""What every kind of source is reduced to before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert_weights.errors import ConversionError
from supra_jax.model.config import ModelConfig

BFLOAT16 = np.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, not read yet.

  Attributes:
    shape: as stored: linear weights are [out, in].
    type_name: the file's own name of the element type.
    dtype: of what is read; None when the type cannot be read.
    num_bytes: size in the file.
    read_rows: (first, last) -> those rows along the first axis, read from the file.
  """

  shape: tuple[int, ...]
  type_name: str
  dtype: np.dtype | None
  num_bytes: int
  read_rows: Callable[[int, int], np.ndarray]

  def read(self) -> np.ndarray:
    """Reads all of it."""
    return self.read_rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)


def read_array(path: Path, name: str, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
  """Reads `count` numbers from a file.

  Raises:
    ConversionError: they cannot be read, or there are fewer.
  """
  try:
    array = np.fromfile(path, dtype, count, offset=offset)
  except OSError as error:
    raise ConversionError(f"{path}: {name} cannot be read: {error.strerror}.") from error
  if array.size != count:
    raise ConversionError(
      f"{path}: truncated while it was read: {name} has {array.nbytes} of {count * dtype.itemsize} bytes."
    )
  return array


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter of ours, not read yet.

  Attributes:
    path: where it lies in our tree.
    shape: its shape there.
    name: of the tensor that it comes from, for messages.
    num_bytes: how many are read for it.
    read: reads it from the file, in our layout and the file's number type.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  name: str
  num_bytes: int
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened source: its config translated, its headers checked, its tensors still on disk.

  Attributes:
    kind: `huggingface`, `openlm` or `gguf`.
    path: the directory or file.
    name: what to call it: its name on the hub with the commit, or that of the file or directory.
    config: what the model is.
    original_config: the config in the source's own words.
    weight_files: the files that hold the tensors.
    tensors: name -> tensor, without those that are known and useless (rotary buffers).
    leaves: every parameter of ours.
    tokenizer_files: file name -> contents.
  """

  kind: str
  path: Path
  name: str
  config: ModelConfig
  original_config: Mapping[str, Any]
  weight_files: Sequence[Path]
  tensors: Mapping[str, StoredTensor]
  leaves: Sequence[Leaf]
  tokenizer_files: Mapping[str, bytes]
