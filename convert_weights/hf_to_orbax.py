r"""Converts a pretrained model into a supra_jax model directory.

python -m convert_weights.hf_to_orbax --source=SOURCE --output=DIR [--dtype=float32|bfloat16]

`open_source` says what a source can be. What cannot be converted exactly is refused by name before anything is written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from convert_weights.errors import ConversionError
from convert_weights.open_source import open_source
from convert_weights.rounding import DTYPES, rounded
from convert_weights.source import BFLOAT16, Source
from supra_jax import checkpoint
from supra_jax.bin.entry import run

_CHUNK_BYTES = 1 << 24


def convert(
  source: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str | None = None, *, progress: bool = False
) -> None:
  """Converts a checkpoint.

  Args:
    source: a directory, a weights file, or a name on the hub; see `open_source`.
    output: the model directory to write; must not exist yet, or be empty.
    dtype: `float32` or `bfloat16`; None keeps the source's: the one type that holds all its tensors exactly, where
      float64 becomes float32, as do quantised tensors.
    progress: show bytes and time left on stderr.

  Raises:
    ConversionError: the source cannot be converted exactly, or `output` holds something; nothing was written.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ConversionError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
  final = Path(output)
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise ConversionError(f"{output} already exists. Remove it or choose another output directory.")
  opened = open_source(source)
  target = DTYPES[dtype] if dtype else _common_dtype(opened)
  with tqdm(
    total=2 * sum(path.stat().st_size for path in opened.weight_files),
    desc="Reading", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress, file=sys.stderr,
  ) as bar:  # fmt: skip
    files = [_describe(path, bar) for path in opened.weight_files]
    params = _read_parameters(opened, target, bar)
    bar.update(bar.total - bar.n)
  if progress:
    print(f"Writing {output} ...", file=sys.stderr)
  checkpoint.save_model(
    final,
    config=opened.config,
    params=params,
    tokenizer_files=opened.tokenizer_files,
    source={
      "kind": opened.kind,
      "name": opened.name,
      "files": files,
      "stored_types": sorted({tensor.type_name for tensor in opened.tensors.values()}),
      "dtype": target.name,
      "supra_jax": _version(),
      "config": opened.original_config,
    },
  )


def _common_dtype(source: Source) -> np.dtype:
  dtypes = {tensor.dtype for tensor in source.tensors.values()}
  only = dtypes.pop() if len(dtypes) == 1 else None
  return only if only in (np.dtype(np.float16), BFLOAT16) else DTYPES["float32"]


def _read_parameters(source: Source, dtype: np.dtype, bar: tqdm) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for leaf in source.leaves:
    *parents, name = leaf.path
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = np.ascontiguousarray(rounded(leaf.read(), dtype, f"{source.path}: {leaf.name}"))
    bar.update(leaf.num_bytes)
  return params


def _describe(path: Path, bar: tqdm) -> dict[str, Any]:
  """Name, size and sha256 of a whole file: the digest that model hubs show."""
  digest = hashlib.sha256()
  for chunk in _chunks(path):
    digest.update(chunk)
    bar.update(len(chunk))
  return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _chunks(path: Path) -> Iterator[bytes]:
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      yield chunk


def _version() -> str | None:
  try:
    return importlib.metadata.version("supra_jax")
  except importlib.metadata.PackageNotFoundError:
    return None


def main() -> None:
  convert(_SOURCE.value, _OUTPUT.value, _DTYPE.value, progress=True)


if __name__ == "__main__":
  _SOURCE = flags.DEFINE_string(
    "source", None, "A directory, a weights file, or owner/name[@revision] on the hub.", required=True
  )
  _OUTPUT = flags.DEFINE_string("output", None, "Model directory to write; must not exist yet.", required=True)
  _DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Type of the parameters; unset keeps the source's.")
  run(main)
