r"""Converts a pretrained model into a supra_jax model directory.

python -m convert_weights.hf_to_orbax --source=SOURCE --output=DIR [--dtype=float32|bfloat16] [--tokenizer=DIR] \
  [--ignore_config_keys=KEY,...]

`open_source` says what SOURCE can be. A model that cannot be converted exactly is refused before anything is written,
and the message names everything that stands in the way.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from convert_weights.config_reader import MAX_SHOWN
from convert_weights.errors import ConversionError
from convert_weights.model_card import stated_license
from convert_weights.open_source import open_source
from convert_weights.program import flags_of
from convert_weights.rounding import DTYPES, rounded
from convert_weights.source import BFLOAT16, Leaf, Source
from supra_jax.bin.entry import run
from supra_jax.core.files import occupied, place
from supra_jax.core.progress import of_bytes
from supra_jax.storage import model_directory as checkpoint
from supra_jax.storage.parameters import UnreadArray

_CHUNK_BYTES = 2**18


def convert(
  source: str | os.PathLike[str],
  output: str | os.PathLike[str],
  dtype: str | None = None,
  *,
  tokenizer: str | os.PathLike[str] | None = None,
  ignore_config_keys: Collection[str] = (),
  progress: bool = False,
) -> None:
  """Converts a checkpoint tensor by tensor, with only a few tensors in memory at a time.

  Args:
    source: a directory, a weights file, or a name on the Hugging Face hub; see `open_source`.
    output: model directory to write, which must be empty or not exist yet.
    dtype: type of the parameters, `float32` or `bfloat16`. None keeps bfloat16 if all tensors have it; otherwise it
      takes float32, which holds float16 and dequantised tensors exactly. float16 is never kept, because activations
      that fit into bfloat16 may overflow float16.
    tokenizer: directory whose tokenizer is used instead of the source's own; None uses the source's own.
    ignore_config_keys: keys of the source's config.json that are not read, since they do not change the model; they are
      recorded in source.json.
    progress: whether to show bytes done and time left on stderr.

  Raises:
    ConversionError: `dtype` is unknown, the source cannot be converted exactly, or `output` is not empty; nothing is
      left behind.
    ValueError: `output` is a URL other than gs://, or its bucket cannot be reached.
    OSError: the output could not be written; nothing is left behind.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ConversionError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
  final = place(output)
  if occupied(final):
    raise ConversionError(f"{output} already exists. Remove it or choose another output directory.")
  opened = open_source(source, tokenizer, ignore_config_keys=ignore_config_keys)
  if progress and opened.ignored_config:
    named = ", ".join(f"{key}={value!r}"[:MAX_SHOWN] for key, value in opened.ignored_config.items())
    print(f"Ignored in the source's config.json: {named}.", file=sys.stderr)
  target = DTYPES[dtype] if dtype else _common_dtype(opened)
  if progress and dtype is None and {tensor.dtype for tensor in opened.tensors.values()} == {np.dtype(np.float16)}:
    wide = sum(math.prod(leaf.shape) * target.itemsize for leaf in opened.leaves)
    print(
      f"float16 becomes float32, which holds it exactly: {wide:,} bytes. --dtype=bfloat16 rounds it to half of that, "
      f"{wide // 2:,} bytes.",
      file=sys.stderr,
    )
  with (
    of_bytes("Converting", sum(leaf.num_bytes for leaf in opened.leaves), enabled=progress) as shown,
    _described(opened.weight_files) as files,
  ):
    checkpoint.save_model(
      final,
      config=opened.config,
      params=_parameters(opened, target, shown.advance),
      tokenizer_files=opened.tokenizer_files,
      source=lambda: {
        "kind": opened.kind,
        "name": opened.name,
        "license": stated_license(opened),
        "files": files.result(),
        "stored_types": sorted({tensor.type_name for tensor in opened.tensors.values()}),
        "dtype": target.name,
        "supra_jax": _version(),
        "config": opened.original_config,
        **({"ignored_config_keys": sorted(opened.ignored_config)} if opened.ignored_config else {}),
      },
    )


def _common_dtype(source: Source) -> np.dtype:
  dtypes = {tensor.dtype for tensor in source.tensors.values()}
  return BFLOAT16 if dtypes == {BFLOAT16} else DTYPES["float32"]


def _parameters(source: Source, dtype: np.dtype, done: Callable[[int], None]) -> dict[str, Any]:
  params: dict[str, Any] = {}
  for leaf in source.leaves:
    *parents, name = leaf.path
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    read = functools.partial(_read, leaf, dtype, f"{source.path}: {leaf.name}", done)
    node[name] = UnreadArray(math.prod(leaf.shape) * dtype.itemsize, read)
  return params


def _read(leaf: Leaf, dtype: np.dtype, name: str, done: Callable[[int], None]) -> np.ndarray:
  array = rounded(leaf.read(), dtype, name)
  done(leaf.num_bytes)
  return array


@contextlib.contextmanager
def _described(paths: Sequence[Path]) -> Iterator[Future[list[dict[str, Any]]]]:
  """Yields a future of the name, size in bytes and sha256 of each file; another thread reads the files.

  The sha256 is that of the whole file, as model hubs show it.
  """
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


def define_flags() -> None:
  """Defines the program's flags; not done on import, since the importer may have flags of the same names."""
  flags.DEFINE_string(
    "source",
    None,
    "Model to convert: a directory, a weights file, or owner/name[@revision][:FILE] on the Hugging Face hub.",
    required=True,
  )
  flags.DEFINE_string("output", None, "Model directory to write; it must be empty or not exist yet.", required=True)
  flags.DEFINE_enum(
    "dtype", None, list(DTYPES), "Type of the parameters; unset keeps pure bfloat16 and converts the rest to float32."
  )
  flags.DEFINE_list(
    "ignore_config_keys", [], "Keys of config.json that are refused as unknown, and do not change the model."
  )
  flags.DEFINE_string("tokenizer", None, "Directory whose tokenizer is used; unset takes the tokenizer of --source.")


def main() -> None:
  """Runs the program with its flags; defines and parses these flags if an importer has not."""
  given = flags_of(define_flags, "source")
  how = {"tokenizer": given.tokenizer, "ignore_config_keys": given.ignore_config_keys}
  convert(given.source, given.output, given.dtype, **how, progress=True)


if __name__ == "__main__":
  define_flags()
  run(main)
