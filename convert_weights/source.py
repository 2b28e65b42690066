"""Description of an opened source, common to all formats: its config, its stored tensors and our parameters."""

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
    shape: shape in the file; linear weights are [out, in].
    type_name: the file's own name of the element type.
    dtype: dtype of the array that reading gives; None if the type cannot be read.
    num_bytes: size in the file, in bytes.
    read_rows: (first, last) -> rows first..last-1 along the first axis, read from the file.
  """

  shape: tuple[int, ...]
  type_name: str
  dtype: np.dtype | None
  num_bytes: int
  read_rows: Callable[[int, int], np.ndarray]

  def read(self) -> np.ndarray:
    """Reads the whole tensor, an array of `shape` and `dtype`."""
    return self.read_rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)


def read_array(path: Path, name: str, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
  """Reads `count` consecutive numbers of a file into an array [count].

  Args:
    path: path of the file.
    name: name of the tensor, for messages.
    dtype: type of the numbers.
    count: number of elements to read.
    offset: position of the first number in the file, in bytes.

  Raises:
    ConversionError: the file cannot be read, or ends before the last number.
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
    path: path of the parameter in our parameter tree.
    shape: shape of the parameter in our layout.
    name: name of the tensor that holds the parameter, for messages.
    num_bytes: number of bytes that `read` reads from the file.
    read: reads the parameter from the file, in our layout and the file's number type (float32 if dequantised).
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  name: str
  num_bytes: int
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened source: its config is translated, its headers are checked, its tensors are still on disk.

  Attributes:
    kind: format of the source, `huggingface`, `openlm` or `gguf`.
    path: directory or file of the source.
    name: name recorded in source.json: the name on the hub with the commit, or the name of the file or directory.
    config: the model's config, translated.
    original_config: the source's own config.
    weight_files: files that hold the tensors.
    tensors: name -> tensor, without tensors that are ignored (rotary frequencies).
    leaves: every parameter of the model in our layout.
    tokenizer_files: file name -> contents of the files to store beside the parameters.
    ignored_config: what the user said not to read of the source's own config.
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
  ignored_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
