"""The types that parameters are stored in, and how a number becomes one of another type."""

from __future__ import annotations

import numpy as np

from convert_weights.errors import ConversionError
from convert_weights.source import BFLOAT16

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


def rounded(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """The numbers in another type.

  Args:
    array: of any floating type.
    dtype: the one wanted.
    name: of the array, in messages.

  Raises:
    ConversionError: some are not finite, or too large for the type.
  """
  if not np.isfinite(array).all():
    raise ConversionError(f"{name} holds numbers that are not finite.")
  if array.dtype != dtype:
    with np.errstate(over="ignore"):
      array = array.astype(np.float32).astype(dtype, copy=False)
    if not np.isfinite(array).all():
      raise ConversionError(f"{name} holds numbers too large for {dtype.name}.")
  return array
