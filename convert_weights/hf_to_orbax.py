r"""Converts a pretrained Llama or Mistral into a supra_jax model directory.

python -m convert_weights.hf_to_orbax --source=DIR_OR_GGUF --output=DIR [--dtype=float32|bfloat16] [--tokenizer=DIR]

The source is a Hugging Face directory with safetensors, a .gguf file of the llama architecture, or a directory that
holds exactly one .gguf and no config.json. What cannot be converted exactly is refused by name before anything is
written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from convert_weights.errors import ConversionError
from convert_weights.gguf_source import open_gguf_source
from convert_weights.hf_source import open_huggingface, tokenizer_files
from convert_weights.source import BFLOAT16, Leaf, Source
from supra_jax import checkpoint
from supra_jax.bin.entry import run
from supra_jax.params_io import UnreadArray
from supra_jax.tokenizer import Tokenizer

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
_CHUNK_BYTES = 2**18
_BLOCK_BYTES = 2**20


def convert(
  source: str | os.PathLike[str],
  output: str | os.PathLike[str],
  dtype: str | None = None,
  *,
  tokenizer: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> None:
  """Converts a checkpoint, tensor by tensor: in memory are a few at a time.

  Args:
    source: a Hugging Face directory, a .gguf file, or a directory with exactly one .gguf and no config.json.
    output: the model directory to write; must not exist yet, or be empty.
    dtype: `float32` or `bfloat16`; None keeps the source's: the one type that holds all its tensors exactly, where
      float64 becomes float32, as do quantised tensors.
    tokenizer: a directory whose tokenizer takes the place of the source's own.
    progress: show bytes and time left on stderr.

  Raises:
    ConversionError: the source cannot be converted exactly, or `output` holds something; nothing is left behind.
    OSError: the output could not be written; nothing is left behind.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ConversionError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
  final = Path(output)
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise ConversionError(f"{output} already exists. Remove it or choose another output directory.")
  opened = open_source(Path(source), tokenizer)
  _check_tokenizer(opened)
  target = DTYPES[dtype] if dtype else _common_dtype(opened)
  with (
    tqdm(
      total=sum(leaf.num_bytes for leaf in opened.leaves),
      desc="Converting", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress, file=sys.stderr,
    ) as bar,
    _described(opened.weight_files) as files,
  ):  # fmt: skip
    checkpoint.save_model(
      final,
      config=opened.config,
      params=_parameters(opened, target, bar),
      tokenizer_files=opened.tokenizer_files,
      source=lambda: {
        "kind": opened.kind,
        "name": opened.path.absolute().name,
        "files": files.result(),
        "stored_types": sorted({tensor.type_name for tensor in opened.tensors.values()}),
        "dtype": target.name,
        "supra_jax": _version(),
        "config": opened.original_config,
      },
    )


def open_source(path: Path, tokenizer: str | os.PathLike[str] | None = None) -> Source:
  """Finds out what a source is and opens it, with the tokenizer of another directory if one is given.

  Raises:
    ConversionError: it is nothing we know, or it cannot be converted.
  """
  if tokenizer is not None:
    files = tokenizer_files(Path(tokenizer))
    if not files:
      raise ConversionError(f"{tokenizer}: holds neither tokenizer.json nor tokenizer.model.")
    return dataclasses.replace(open_source(path), tokenizer_files=files)
  if path.is_file() and path.suffix == ".gguf":
    return open_gguf_source(path)
  if path.is_dir() and (path / "config.json").exists():
    return open_huggingface(path)
  if path.is_dir():
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
      return open_gguf_source(ggufs[0])
    raise ConversionError(f"{path}: has no config.json and {len(ggufs)} .gguf files: wanted one or the other.")
  if not path.exists():
    raise ConversionError(f"{path} does not exist. Give a directory or a .gguf file on this machine.")
  raise ConversionError(f"{path}: wanted a directory or a .gguf file.")


def _check_tokenizer(source: Source) -> None:
  try:
    Tokenizer.from_files(source.tokenizer_files, source.config)
  except ValueError as error:
    raise ConversionError(f"{source.path}: the tokenizer cannot be used: {error}") from error


def _common_dtype(source: Source) -> np.dtype:
  dtypes = {tensor.dtype for tensor in source.tensors.values()}
  only = dtypes.pop() if len(dtypes) == 1 else None
  return only if only in (np.dtype(np.float16), BFLOAT16) else DTYPES["float32"]


def _parameters(source: Source, dtype: np.dtype, bar: tqdm) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for leaf in source.leaves:
    *parents, name = leaf.path
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    read = functools.partial(_read, leaf, dtype, f"{source.path}: {leaf.name}", bar)
    node[name] = UnreadArray(math.prod(leaf.shape) * dtype.itemsize, read)
  return params


def _read(leaf: Leaf, dtype: np.dtype, name: str, bar: tqdm) -> np.ndarray:
  array = _rounded(leaf.read(), dtype, name)
  bar.update(leaf.num_bytes)
  return array


def _rounded(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Checks an array, rounds it and lays it out anew, block by block: blocks stay in the processor's cache."""
  ready = array.dtype == dtype and array.flags.c_contiguous
  result = array if ready else np.empty(array.shape, dtype)
  # What are rows in the file are columns in a transposed array.
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
  # A third of the time: what is not finite has an exponent of ones, as infinity, which has nothing else.
  ones = np.array(np.inf, array.dtype).view(np.uint16)
  return bool(((array.view(np.uint16) & ones) != ones).all())


@contextlib.contextmanager
def _described(paths: Sequence[Path]) -> Iterator[Future[list[dict[str, Any]]]]:
  """Yields name, size and sha256 of whole files, the digest that model hubs show; they are read by another thread."""
  stopped = threading.Event()

  def describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
      while not stopped.is_set() and (chunk := file.read(_CHUNK_BYTES)):
        digest.update(chunk)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}

  with ThreadPoolExecutor(1) as pool:
    try:
      yield pool.submit(lambda: [describe(path) for path in paths])
    finally:
      stopped.set()


def _version() -> str | None:
  try:
    return importlib.metadata.version("supra_jax")
  except importlib.metadata.PackageNotFoundError:
    return None


def main() -> None:
  convert(_SOURCE.value, _OUTPUT.value, _DTYPE.value, tokenizer=_TOKENIZER.value, progress=True)


if __name__ == "__main__":
  _SOURCE = flags.DEFINE_string(
    "source", None, "Hugging Face directory, or a .gguf file of the llama architecture.", required=True
  )
  _OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist yet.", required=True)
  _DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Type of the parameters; unset keeps the source's.")
  _TOKENIZER = flags.DEFINE_string("tokenizer", None, "Directory whose tokenizer to take; unset takes the source's.")
  run(main)
