r"""Exports a supra_jax model directory to transformers, or to OpenLM, the paper's code.

python -m convert_weights.orbax_to_hf --source=DIR --output=DIR [--format=transformers|openlm] [--dtype=...]

`transformers`: if the model is a Llama, Mistral, Qwen2 or Qwen3 model, transformers' own class loads it. Any other
model, and so every model with SUPRA layers, is written with its code in plain torch, and is loaded with
from_pretrained(DIR, trust_remote_code=True).
`openlm`: the format that the paper's code loads. A model that this format cannot express is refused before anything is
written, and the message names what stands in the way.
Both formats come with a model card, README.md, which says where the model comes from and how to load and upload it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags

from convert_weights import hf_export, model_card, openlm_export
from convert_weights.errors import ConversionError
from convert_weights.export import Export, Part
from convert_weights.program import flags_of
from convert_weights.rounding import DTYPES, rounded
from convert_weights.safetensors_writer import TYPES, num_bytes, write_safetensors
from convert_weights.tokenizer_export import exported_tokenizer
from convert_weights.tokenizer_source import GENERATION_FILE, TEMPLATE_FILE, as_json
from supra_jax.bin.entry import run
from supra_jax.core.files import check_free, local, new_directory
from supra_jax.core.progress import of_bytes
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.storage.model_directory import ModelCheckpoint, load_model_without_params
from supra_jax.storage.parameter_reader import ParameterReader

FORMATS = {"transformers": hf_export.export, "openlm": openlm_export.export}


def convert(
  source: str | os.PathLike[str],
  output: str | os.PathLike[str],
  format: str = "transformers",
  dtype: str | None = None,
  *,
  progress: bool = False,
) -> None:
  """Writes a model of supra_jax in another program's format.

  Args:
    source: model directory of supra_jax.
    output: directory to write, which must be empty or not exist yet.
    format: `transformers` or `openlm`.
    dtype: type of the weights, `float32` or `bfloat16`; None keeps the stored type, or takes float32 if the parameters
      have several types.
    progress: whether to show bytes written and time left on stderr.

  Raises:
    ConversionError: `format` or `dtype` is unknown, the format cannot express the model exactly, or the disk is full or
      fails; nothing is left behind.
    ValueError, OSError: the source is damaged or is no model, or `output` is not empty.
  """
  if format not in FORMATS:
    raise ConversionError(f"format={format!r}: wanted one of {', '.join(FORMATS)}.")
  if dtype is not None and dtype not in DTYPES:
    raise ConversionError(f"dtype={dtype!r}: wanted one of {', '.join(DTYPES)}.")
  check_free(local(output))
  model = load_model_without_params(source)
  export = FORMATS[format](model.config)
  with ParameterReader(source) as reader:
    _check_types(source, reader)
    target = DTYPES[dtype] if dtype else _common_dtype(reader)
    files = _files(export, model, target)
    total = sum(num_bytes(tensor.shape, target) for tensor in export.tensors)

    def read(part: Part) -> np.ndarray:
      return part.change(rounded(reader.read(part.path), target, f"{source}: {'.'.join(part.path)}"))

    with (
      new_directory(output) as directory,
      of_bytes(f"Writing {output}", total, enabled=progress) as shown,
      _named_errors(output, directory, total),
    ):
      write_safetensors(directory, export.tensors, target, read, shown.advance)
      for name, contents in files.items():
        (directory / name).write_bytes(contents)


def _check_types(source: str | os.PathLike[str], reader: ParameterReader) -> None:
  for path, leaf in reader.shapes.items():
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ConversionError(f"{source}: {'.'.join(path)} has dtype {leaf.dtype}: wanted floating-point numbers.")


def _common_dtype(reader: ParameterReader) -> np.dtype:
  dtypes = {np.dtype(leaf.dtype) for leaf in reader.shapes.values()}
  return dtypes.pop() if len(dtypes) == 1 and dtypes <= TYPES.keys() else DTYPES["float32"]


def _files(export: Export, model: ModelCheckpoint, dtype: np.dtype) -> dict[str, bytes]:
  """Returns file name -> contents of every file of the export except the weights."""
  files = dict(export.files)
  config = {**export.config, "dtype": dtype.name}
  if GENERATION_FILE in files and GENERATION_FILE in model.tokenizer_files:
    # Sampling and padding come from the source's file; token ids of the model's config take precedence.
    generation = json.loads(model.tokenizer_files[GENERATION_FILE]) | json.loads(files[GENERATION_FILE])
    files[GENERATION_FILE] = as_json(generation)
    if isinstance(generation.get("pad_token_id"), int):
      config["pad_token_id"] = generation["pad_token_id"]
  tokenizer = Tokenizer.from_files(model.tokenizer_files, model.config)
  if tokenizer is not None:
    files |= exported_tokenizer(model.tokenizer_files, tokenizer)
    if "tokenizer.json" not in files:
      print(
        "note: no tokenizer.json gives the ids of this tokenizer.model, so tokenizer.model is written unchanged. With "
        "it, ids depend on the release of transformers: compare them with the model's.",
        file=sys.stderr,
      )
  if TEMPLATE_FILE in model.tokenizer_files:
    files[TEMPLATE_FILE] = model.tokenizer_files[TEMPLATE_FILE]
  card = model_card.card(model, export, dtype, has_tokenizer=tokenizer is not None)
  return {"config.json": as_json(config), **files, model_card.FILE: card}


@contextlib.contextmanager
def _named_errors(output: str | os.PathLike[str], directory: Path, total: int) -> Iterator[None]:
  """Turns an OSError into a ConversionError that names `output` and `total`, the bytes needed.

  If the disk has too little room, the error comes before anything is written.
  """
  disk = shutil.disk_usage(directory)
  free = disk.free if disk.total else total  # some network disks report a total size of 0 bytes
  try:
    if free < total:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield
  except OSError as error:
    said = f"{output} could not be written: {error.strerror}. It takes {total:,} bytes; {free:,} were free."
    raise ConversionError(said) from error


def define_flags() -> None:
  """Defines the program's flags; not done on import, since the importer may have flags of the same names."""
  flags.DEFINE_string("source", None, "Model directory of supra_jax to export.", required=True)
  flags.DEFINE_string("output", None, "Directory to write; it must be empty or not exist yet.", required=True)
  flags.DEFINE_enum(
    "format", "transformers", list(FORMATS), "Program that will load the export; openlm is the paper's code."
  )
  flags.DEFINE_enum(
    "dtype", None, list(DTYPES), "Type of the exported weights; unset keeps the stored type, or float32 if it varies."
  )


def main() -> None:
  """Runs the program with its flags; defines and parses these flags if an importer has not."""
  given = flags_of(define_flags, "source")
  convert(given.source, given.output, given.format, given.dtype, progress=True)


if __name__ == "__main__":
  define_flags()
  run(main)
