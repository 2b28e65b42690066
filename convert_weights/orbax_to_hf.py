r"""Writes a supra_jax model directory for others: for transformers, or for OpenLM, the paper's code.

python -m convert_weights.orbax_to_hf --source=DIR --output=DIR [--format=transformers|openlm] [--dtype=...]

`transformers`: a class of its own loads it where one is this model (Llama, Mistral, Qwen2, Qwen3). Else, and so for all
that has SUPRA layers, the directory holds its own code in plain torch: from_pretrained(DIR, trust_remote_code=True).
`openlm`: what the paper's code loads. What it cannot say is refused by name before anything is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from convert_weights import hf_export, names, openlm_export
from convert_weights.errors import ConversionError
from convert_weights.export import Export, Part
from convert_weights.leaves import check_tensors
from convert_weights.rounding import DTYPES, rounded
from convert_weights.safetensors_writer import TYPES, num_bytes, write_safetensors
from convert_weights.source import StoredTensor
from supra_jax.bin.entry import run
from supra_jax.checkpoint import load_model_without_params
from supra_jax.config import ModelConfig
from supra_jax.files import check_free, local, new_directory
from supra_jax.parameter_reader import ParameterReader

FORMATS = {"transformers": hf_export.export, "openlm": openlm_export.export}
# Where the tokenizer's own config does not say, transformers goes by the model, and may not know it, or follow its
# family's rules in place of those in the file.
_TOKENIZER_CLASSES = {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}


def convert(
  source: str | os.PathLike[str],
  output: str | os.PathLike[str],
  format: str = "transformers",
  dtype: str | None = None,
  *,
  progress: bool = False,
) -> None:
  """Writes a model for others.

  Args:
    source: a model directory of ours.
    output: the directory to write; must not exist yet, or be empty.
    format: `transformers` or `openlm`.
    dtype: `float32` or `bfloat16`; None keeps what is stored, or float32 where types are mixed.
    progress: show bytes and time left on stderr.

  Raises:
    ConversionError: it cannot be written exactly; nothing was.
    ValueError, OSError: the source is no model, or damaged; `output` holds something.
  """
  if format not in FORMATS:
    raise ConversionError(f"format={format!r}: wanted one of {', '.join(FORMATS)}.")
  if dtype is not None and dtype not in DTYPES:
    raise ConversionError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
  check_free(local(output))
  model = load_model_without_params(source)
  export = FORMATS[format](model.config)
  with ParameterReader(source) as reader:
    _check_parameters(source, reader, model.config)
    target = DTYPES[dtype] if dtype else _common_dtype(reader)
    total = sum(num_bytes(tensor.shape, target) for tensor in export.tensors)

    def read(part: Part) -> np.ndarray:
      return part.change(rounded(reader.read(part.path), target, f"{source}: {'.'.join(part.path)}"))

    with (
      new_directory(output) as directory,
      tqdm(
        total=total, desc=f"Writing {output}", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress,
        file=sys.stderr,
      ) as bar,
      _named_errors(output, directory, total),
    ):  # fmt: skip
      write_safetensors(directory, export.tensors, target, read, bar.update)
      for name, contents in _files(export, model.tokenizer_files, target).items():
        (directory / name).write_bytes(contents)


def _check_parameters(source: str | os.PathLike[str], reader: ParameterReader, config: ModelConfig) -> None:
  """Every parameter of the model is there, in its shape, and nothing else."""
  found = {}
  for path, leaf in reader.shapes.items():
    dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None
    read_rows = lambda first, last, path=path: reader.read(path)[first:last]  # noqa: E731
    found["/".join(path)] = StoredTensor(
      leaf.shape, leaf.dtype.name, dtype, num_bytes(leaf.shape, leaf.dtype), read_rows
    )
  check_tensors(str(source), {"/".join(p.path): p.shape for p in names.parameters(config)}, found, optional={})


def _common_dtype(reader: ParameterReader) -> np.dtype:
  dtypes = {np.dtype(leaf.dtype) for leaf in reader.shapes.values()}
  return dtypes.pop() if len(dtypes) == 1 and dtypes <= TYPES.keys() else DTYPES["float32"]


def _files(export: Export, tokenizer_files: Mapping[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
  """Name -> contents of all but the weights."""
  config = {**export.config, "dtype": dtype.name}
  files = {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **export.files, **tokenizer_files}
  tokenizer_class = next((name for file, name in _TOKENIZER_CLASSES.items() if file in files), None)
  settings = json.loads(files.get("tokenizer_config.json", b"{}"))
  if tokenizer_class is not None and settings.get("tokenizer_class") is None:
    settings["tokenizer_class"] = tokenizer_class
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
  return files


@contextlib.contextmanager
def _named_errors(output: str | os.PathLike[str], directory: Path, total: int) -> Iterator[None]:
  """Says what could not be written; a disk that is too full, before it is full."""
  disk = shutil.disk_usage(directory)
  free = disk.free if disk.total else total  # some network disks say that they have 0 bytes in all
  try:
    if free < total:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield
  except OSError as error:
    said = f"{output} could not be written: {error.strerror}. It takes {total:,} bytes; {free:,} were free."
    raise ConversionError(said) from error


def main() -> None:
  convert(_SOURCE.value, _OUTPUT.value, _FORMAT.value, _DTYPE.value, progress=True)


if __name__ == "__main__":
  _SOURCE = flags.DEFINE_string("source", None, "Model directory of supra_jax.", required=True)
  _OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must not exist yet.", required=True)
  _FORMAT = flags.DEFINE_enum("format", "transformers", list(FORMATS), "Who is to load it; openlm: the paper's code.")
  _DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "Type of the weights; unset keeps what is stored.")
  run(main)
