"""Reads the parameters of a model directory one at a time, for models whose parameters do not all fit into memory."""

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
from supra_jax.storage.parameters import stored_shapes


class ParameterReader:
  """Reads single parameters of a model directory; a context manager.

  Attributes:
    shapes: path in the tree of parameters -> shape and dtype of the parameter.
  """

  shapes: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]

  def __init__(self, directory: str | os.PathLike[str]):
    """Opens the checkpoint and reads the shapes and dtypes of all parameters, but no values.

    Args:
      directory: a model directory, local or gs://.

    Raises:
      ValueError: the directory holds no parameters, they are damaged, or `core.files.place` rejects `directory`.
    """
    self._path = absolute(directory) / PARAMS_DIRECTORY
    self._checkpointer = ocp.PyTreeCheckpointer()
    leaves, _ = jax.tree_util.tree_flatten_with_path(stored_shapes(self._checkpointer, self._path))
    self.shapes = {tuple(key.key for key in path): leaf for path, leaf in leaves}

  def read(self, path: tuple[str, ...]) -> np.ndarray:
    """Returns the parameter at a path, a key of `shapes`, with its stored shape and dtype.

    Raises:
      ValueError: the parameter cannot be read.
    """
    # Orbax takes two trees with the parameter as their only leaf: what to read (any leaf will do), and how.
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
