"""Opens the source that a user names: a directory, a file, or a model on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from convert_weights import hub, openlm_config
from convert_weights.errors import ConversionError, listing, read_json_object
from convert_weights.gguf_parts import first_parts
from convert_weights.gguf_source import open_gguf_source
from convert_weights.hf_config import TRANSLATED
from convert_weights.hf_source import config_of, open_huggingface
from convert_weights.openlm_source import open_openlm
from convert_weights.source import Source
from convert_weights.tokenizer_source import GENERATION_FILE, tokenizer_files
from convert_weights.tokenizer_vocabularies import VOCABULARIES
from convert_weights.weights import WEIGHT_SUFFIXES, has_weights, refuse_other_forms
from supra_jax.core.files import local
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig


class _Given(NamedTuple):
  """What is given beside a source.

  Attributes:
    tokenizer: file name -> contents of a tokenizer; None: the source's own.
    ignored: keys of config.json that are not read.
  """

  tokenizer: Mapping[str, bytes] | None
  ignored: Collection[str]


def open_source(
  source: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] | None = None,
  *,
  own_tokenizer: bool = True,
  ignore_config_keys: Collection[str] = (),
) -> Source:
  """Determines the format of a source and opens it.

  Args:
    source: a directory with config.json and weights, or with one GGUF model; a weights file, with config.json beside it
      unless it is a .gguf file; or `owner/name[@revision][:FILE]` on the Hugging Face hub, which is downloaded first.
    tokenizer: directory whose tokenizer is used instead of the source's own; None: see `own_tokenizer`.
    own_tokenizer: whether to read the source's own tokenizer if `tokenizer` is None.
    ignore_config_keys: keys of config.json that do not change the model, as the user knows.

  Raises:
    ConversionError: the format is unknown, or the model or the tokenizer cannot be converted.
  """
  files: Mapping[str, bytes] | None = None if own_tokenizer else {}
  if tokenizer is not None:
    files = {name: contents for name, contents in tokenizer_files(local(tokenizer)).items() if name != GENERATION_FILE}
    if not local(tokenizer).is_dir():
      raise ConversionError(f"{tokenizer}: wanted a directory that holds a tokenizer; there is no such directory.")
    if not files:
      raise ConversionError(f"{tokenizer}: holds no tokenizer: none of {', '.join(VOCABULARIES)}.")
  opened = _open(source, _Given(files, ignore_config_keys))
  return _with_checked_tokenizer(opened, opened.path if tokenizer is None else tokenizer)


def open_tokenizer(source: str | os.PathLike[str]) -> tuple[dict[str, bytes], ModelConfig | None]:
  """Returns the files of a Hugging Face model's tokenizer, and the config of the model; its weights are not needed.

  Args:
    source: a directory, or `owner/name[@revision]` on the hub. The config is None if there is no config.json, or one of
      a model that cannot be converted: its tokenizer may serve another.

  Raises:
    ConversionError: there is no such model, or it has no tokenizer that can be used.
  """
  path = local(source)
  directory = path if path.is_dir() else hub.download(str(source), weights=False)[0]
  files = tokenizer_files(directory)
  if not any(name in files for name in ("tokenizer.json", "tokenizer.model")):
    raise ConversionError(f"{source}: holds no tokenizer: none of {', '.join(VOCABULARIES)}.")
  try:
    return files, config_of(directory, read_json_object(directory / "config.json"))
  except ConversionError:
    return files, None


def _open(source: str | os.PathLike[str], given: _Given) -> Source:
  if local(source).exists():
    return _open_path(Path(source), given)
  # A source that is no path on this machine may be a name on the hub.
  path, name = hub.download(str(source))
  return dataclasses.replace(_open_path(path, given), name=name)


def _open_path(path: Path, given: _Given) -> Source:
  if path.is_dir():
    return _open_directory(path, given)
  if path.suffix == ".gguf":
    return _open_gguf(path, given)
  if path.suffix in WEIGHT_SUFFIXES:
    refuse_other_forms(path, [path.name])
    return _open_weights(path.parent, path, given)
  raise ConversionError(f"{path}: wanted a directory or a .gguf, {', '.join(WEIGHT_SUFFIXES)} file.")


def _open_gguf(path: Path, given: _Given) -> Source:
  if given.ignored:
    raise ConversionError(f"ignore_config_keys={','.join(given.ignored)}: {path} has no config.json.")
  return open_gguf_source(path, given.tokenizer)


def _open_directory(path: Path, given: _Given) -> Source:
  names = [file.name for file in path.iterdir()]
  refuse_other_forms(path, names)
  ggufs = first_parts(names)
  if ggufs and not has_weights(names):
    if len(ggufs) > 1:
      raise ConversionError("\n".join([f"{path}: give one of its files.", *listing("GGUF models", ggufs)]))
    return _open_gguf(path / ggufs[0], given)
  if "config.json" not in names:
    raise ConversionError(f"{path}: holds neither config.json nor a .gguf file.")
  return _open_weights(path, None, given)


def _open_weights(directory: Path, file: Path | None, given: _Given) -> Source:
  original = read_json_object(directory / "config.json")
  is_openlm = original.get("model_type") == openlm_config.MODEL_TYPE
  ignored = {key: original[key] for key in given.ignored if key in original}
  wrong = sorted(set(given.ignored) - ignored.keys() | (ignored.keys() & (set() if is_openlm else TRANSLATED)))
  if wrong:
    raise ConversionError(
      f"ignore_config_keys={','.join(wrong)}: wanted keys of {directory / 'config.json'} that no model here is made of."
    )
  read = {key: value for key, value in original.items() if key not in ignored}
  opened = (open_openlm if is_openlm else open_huggingface)(directory, read, file, given.tokenizer)
  return dataclasses.replace(opened, original_config=original, ignored_config=ignored)


def _with_checked_tokenizer(source: Source, where: str | os.PathLike[str]) -> Source:
  """Returns the source after checking that its tokenizer can be used.

  The config of an OpenLM model, or of a GGUF file without EOS ids, gets the tokenizer's BOS and EOS ids. OpenLM's own
  configs have no such ids, nor has a GGUF file without a tokenizer, to which `--tokenizer` gives one.

  Raises:
    ConversionError: the tokenizer cannot be used.
  """
  try:
    tokenizer = Tokenizer.from_files(source.tokenizer_files, source.config)
  except ValueError as error:
    raise ConversionError(f"{where}: the tokenizer cannot be used: {error}") from error
  says_nothing = source.kind == "gguf" and not source.config.eos_token_ids
  if tokenizer is None or not (source.kind == openlm_config.MODEL_TYPE or says_nothing):
    return source
  config = source.config.replace(bos_token_id=tokenizer.bos_id, eos_token_ids=tokenizer.eos_ids)
  return dataclasses.replace(source, config=config)
