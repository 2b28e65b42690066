"""Parameters of a model directory, read one at a time: of a large model, all do not fit into memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from supra_jax.core.files import absolute
from supra_jax.storage.disk import first_line
from supra_jax.storage.model_directory import PARAMS_DIRECTORY


class ParameterReader:
  """What lies in the params of a model directory.

  Attributes:
    shapes: path in the tree -> shape and dtype of each parameter.
  """

  shapes: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]

  def __init__(self, directory: str | os.PathLike[str]):
    """Reads shapes alone.

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    self._path = absolute(directory) / PARAMS_DIRECTORY
    self._checkpointer = ocp.PyTreeCheckpointer()
    try:
      metadata = self._checkpointer.metadata(self._path).item_metadata
    except Exception as error:  # of Orbax's and tensorstore's many kinds
      raise ValueError(f"{self._path}: no parameters can be read: {first_line(error)}") from error
    if metadata is None:
      raise ValueError(f"{self._path}: no parameters can be read: it is no Orbax checkpoint, or a damaged one.")
    tree = metadata.tree
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    self.shapes = {
      tuple(key.key for key in path): jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves
    }

  def read(self, path: tuple[str, ...]) -> np.ndarray:
    """One parameter, as it is stored.

    Raises:
      ValueError: it is damaged.
    """
    # Orbax wants trees: of what to read (any leaf will do) and of how.
    wanted: Any = ...
    how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for name in reversed(path):
      wanted, how = {name: wanted}, {name: how}
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    try:
      found = self._checkpointer.restore(self._path, args=args)
    except Exception as error:
      raise ValueError(f"{self._path}: {'.'.join(path)} cannot be read: {first_line(error)}") from error
    for name in path:
      found = found[name]
    return found

  def __enter__(self) -> ParameterReader:
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpointer.close()
