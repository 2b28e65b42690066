"""The types in which parameters are stored, and the conversion of arrays to these types."""

from __future__ import annotations

import numpy as np

from convert_weights.errors import ConversionError
from convert_weights.source import BFLOAT16

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
_BLOCK_BYTES = 2**20


def rounded(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Casts an array to `dtype`, in C order; returns the array itself if it has that type and order already.

  Args:
    array: array of any floating type and memory layout.
    dtype: type of the result.
    name: name of the array, for messages.

  Raises:
    ConversionError: some numbers are not finite, or too large for the type.
  """
  ready = array.dtype == dtype and array.flags.c_contiguous
  result = array if ready else np.empty(array.shape, dtype)
  # Walks along the axis that is contiguous in the file, which for a transposed array is its last one. The blocks are
  # small enough for all steps on one of them to stay in the processor's cache.
  rows, target = (array, result) if array.flags.c_contiguous else (array.T, result.T)
  step = max(1, _BLOCK_BYTES * len(rows) // rows.nbytes)
  for start in range(0, len(rows), step):
    block = rows[start : start + step]
    if not _all_finite(block):
      raise ConversionError(f"{name} holds numbers that are not finite.")
    if block.dtype != dtype:
      with np.errstate(over="ignore"):
        block = block.astype(np.float32).astype(dtype, copy=False)
      if not _all_finite(block):
        raise ConversionError(f"{name} holds numbers too large for {dtype.name}.")
    if not ready:
      target[start : start + step] = block
  return result


def _all_finite(array: np.ndarray) -> bool:
  if array.dtype.itemsize != 2:
    return bool(np.isfinite(array).all())
  # Takes a third of np.isfinite's time. Infinities and NaN are the numbers whose exponent bits are all ones, and
  # infinity has no other bits.
  ones = np.array(np.inf, array.dtype).view(np.uint16)
  return bool(((array.view(np.uint16) & ones) != ones).all())
