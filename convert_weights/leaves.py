"""Checks that a source's tensors are exactly those its config calls for, and reads the tensors as our parameters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert_weights.errors import ConversionError, listing
from convert_weights.names import Parameter
from convert_weights.source import Leaf, StoredTensor


def check_tensors(
  source: str,
  wanted: Mapping[str, tuple[int, ...]],
  found: Mapping[str, StoredTensor],
  optional: Mapping[str, tuple[int, ...]],
) -> None:
  """Compares the tensors that a source has with those that its config calls for.

  Args:
    source: name of the source, for messages.
    wanted: name -> shape of each required tensor.
    found: name -> tensor of the source, without tensors that are ignored.
    optional: name -> shape of each tensor that may exist, but need not.

  Raises:
    ConversionError: tensors are missing, unknown, mis-shaped or of an unreadable type; the message lists up to
      MAX_LISTED of each kind.
  """
  known = {**optional, **wanted}
  lines = [
    *listing("missing tensors", (f"{name} {list(wanted[name])}" for name in wanted if name not in found)),
    *listing("unknown tensors", (f"{name} {list(found[name].shape)}" for name in sorted(set(found) - set(known)))),
    *listing(
      "tensors of another shape than the config gives",
      (
        f"{name}: wanted {list(shape)}, got {list(found[name].shape)}"
        for name, shape in known.items()
        if name in found and found[name].shape != shape
      ),
    ),
    *listing(
      "tensors of a type that cannot be read",
      (f"{name}: {tensor.type_name}" for name, tensor in found.items() if tensor.dtype is None),
    ),
  ]
  if lines:
    raise ConversionError("\n".join([f"{source}: the tensors are not those its config describes.", *lines]))


def make_leaf(
  source: str,
  parameter: Parameter,
  name: str,
  tensors: Mapping[str, StoredTensor],
  *,
  first_row: int = 0,
  twin: str | None = None,
) -> Leaf:
  """Returns the leaf of a parameter that consists of consecutive rows of a tensor.

  Args:
    source: name of the source, for messages.
    parameter: parameter to read.
    name: name of the tensor that holds the parameter.
    tensors: name -> tensor of the source, after `check_tensors`.
    first_row: first row of the parameter in the tensor.
    twin: name of a tensor that, if it exists, must equal the parameter: some sources store tied embeddings twice. None:
      there is no such tensor.

  Returns:
    The leaf. Its `read` raises ConversionError if the twin has other values.
  """
  stored, other = tensors[name], tensors.get(twin) if twin else None
  rows = parameter.source_shape[0]

  def read() -> np.ndarray:
    array = stored.read_rows(first_row, first_row + rows)
    if other is not None and not np.array_equal(other.read(), array):
      raise ConversionError(f"{source}: the config ties the embeddings, but {twin} differs from {name}.")
    return array.swapaxes(-1, -2) if parameter.transposed else array

  num_bytes = stored.num_bytes * rows // stored.shape[0] + (other.num_bytes if other else 0)
  return Leaf(parameter.path, parameter.shape, name, num_bytes, read)
