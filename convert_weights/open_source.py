"""What a user calls a source -> an opened one: a directory, a file, or a name on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from convert_weights import hub, openlm_config
from convert_weights.errors import ConversionError, read_json_object
from convert_weights.gguf_source import open_gguf_source
from convert_weights.hf_source import open_huggingface
from convert_weights.openlm_source import open_openlm
from convert_weights.source import Source, tokenizer_files
from convert_weights.weights import WEIGHT_SUFFIXES
from supra_jax.files import local
from supra_jax.tokenizer import Tokenizer


def open_source(source: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Source:
  """Finds out what a source is and opens it.

  Args:
    source: a directory with a config.json and weights, or with a single .gguf file; a weights file, with config.json
      beside it unless it is a .gguf; or `owner/name[@revision]` on the hub, which is downloaded first.
    tokenizer: a directory whose tokenizer takes the place of the source's own.

  Raises:
    ConversionError: it is nothing we know, or it cannot be converted.
  """
  opened = _open(source)
  if tokenizer is not None:
    files = tokenizer_files(local(tokenizer))
    if not files:
      raise ConversionError(f"{tokenizer}: holds neither tokenizer.json nor tokenizer.model.")
    opened = dataclasses.replace(opened, tokenizer_files=files)
  return _with_checked_tokenizer(opened, opened.path if tokenizer is None else tokenizer)


def _open(source: str | os.PathLike[str]) -> Source:
  if local(source).exists():
    return _open_path(Path(source))
  # What is no path on this machine may be a name elsewhere.
  path = hub.download(str(source))
  name = str(source).partition("@")[0]
  return dataclasses.replace(_open_path(path), name=f"{name}@{path.name}")  # the cache has a directory a commit


def _open_path(path: Path) -> Source:
  if path.is_dir():
    if (path / "config.json").exists():
      return _open_directory(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) != 1:
      raise ConversionError(f"{path}: has no config.json and {len(ggufs)} .gguf files: wanted one or the other.")
    return open_gguf_source(ggufs[0])
  if path.suffix == ".gguf":
    return open_gguf_source(path)
  if path.suffix in WEIGHT_SUFFIXES:
    return _open_directory(path.parent, path)
  raise ConversionError(f"{path}: wanted a directory or a .gguf, {', '.join(WEIGHT_SUFFIXES)} file.")


def _open_directory(directory: Path, file: Path | None = None) -> Source:
  original = read_json_object(directory / "config.json")
  is_openlm = original.get("model_type") == openlm_config.MODEL_TYPE
  return (open_openlm if is_openlm else open_huggingface)(directory, original, file)


def _with_checked_tokenizer(source: Source, where: str | os.PathLike[str]) -> Source:
  """The source, if its tokenizer can be used; OpenLM's configs leave the ids that begin and end a text to it."""
  try:
    tokenizer = Tokenizer.from_files(source.tokenizer_files, source.config)
  except ValueError as error:
    raise ConversionError(f"{where}: the tokenizer cannot be used: {error}") from error
  if tokenizer is None or source.kind != openlm_config.MODEL_TYPE:
    return source
  config = source.config.replace(bos_token_id=tokenizer.bos_id, eos_token_ids=tokenizer.eos_ids)
  return dataclasses.replace(source, config=config)
