"""Models on the Hugging Face hub: what is needed of one is downloaded, into the cache that all tools share."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from convert_weights.errors import ConversionError

_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")
_SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Many models have their weights in several forms; the first of these is taken.
_WEIGHTS = (
  re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
  re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
  re.compile(r"[^/]+\.gguf"),
)
_ANSWER_SECONDS = 10


def download(source: str) -> Path:
  """The directory of a model `owner/name[@revision]` in the cache, downloaded as far as it is not there yet.

  Raises:
    ConversionError: that is no name on the hub; it cannot be reached and the cache does not have the model; or the
      model has no weights that we read.
  """
  named = _ID.fullmatch(source)
  if named is None:
    raise ConversionError(f"{source} does not exist. Give a directory, a file, or owner/name[@revision] on the hub.")
  name, revision = named["name"], named["revision"]
  try:
    info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_ANSWER_SECONDS)
  except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
    raise ConversionError(f"{source} is no path on this machine, and the hub says: {_last_line(error)}") from error
  except Exception as error:  # of whichever HTTP client this version of huggingface_hub has
    return _cached(source, name, revision, error)
  wanted = wanted_files([sibling.rfilename for sibling in info.siblings or ()])
  if not wanted:
    raise ConversionError(f"{source}: the hub has no safetensors, pytorch_model.bin or single .gguf file of it.")
  try:
    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
  except Exception as error:
    raise ConversionError(f"{source}: the download failed; run it again to go on: {_last_line(error)}") from error


def wanted_files(files: Collection[str]) -> list[str]:
  """Of a model's files those that a conversion reads; none where there are no weights."""
  for pattern in _WEIGHTS:
    weights = [name for name in files if pattern.fullmatch(name)]
    if weights and not (len(weights) > 1 and weights[0].endswith(".gguf")):
      return [name for name in _SMALL_FILES if name in files] + sorted(weights)
  return []


def _cached(source: str, name: str, revision: str | None, error: Exception) -> Path:
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name, revision=revision, local_files_only=True, allow_patterns=list(_SMALL_FILES)
      )
    )
  except OSError:
    raise ConversionError(
      f"{source} is no path on this machine, the hub cannot be reached ({_last_line(error)}), and its cache does not "
      "have it."
    ) from error


def _last_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[-1]
