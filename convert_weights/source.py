"""What every kind of source is reduced to before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from supra_jax.config import ModelConfig

BFLOAT16 = np.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, not read yet.

  Attributes:
    shape: as stored: linear weights are [out, in].
    type_name: the file's own name of the element type.
    dtype: what `read` returns; None when the type cannot be read.
    num_bytes: size in the file.
    read: reads it from the file.
  """

  shape: tuple[int, ...]
  type_name: str
  dtype: np.dtype | None
  num_bytes: int
  read: Callable[[], np.ndarray]


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
    kind: `huggingface` or `gguf`.
    path: the directory or file.
    config: what the model is.
    original_config: the config in the source's own words.
    weight_files: the files that hold the tensors.
    tensors: name -> tensor, without those that are known and useless (rotary buffers).
    leaves: every parameter of ours.
    tokenizer_files: file name -> contents.
  """

  kind: str
  path: Path
  config: ModelConfig
  original_config: Mapping[str, Any]
  weight_files: Sequence[Path]
  tensors: Mapping[str, StoredTensor]
  leaves: Sequence[Leaf]
  tokenizer_files: Mapping[str, bytes]
