"""Downloads from the Hugging Face hub the files that a conversion reads, into the cache that all tools share."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
  GatedRepoError,
  HFValidationError,
  RepositoryNotFoundError,
  RevisionNotFoundError,
)

from convert_weights.errors import ConversionError, listing
from convert_weights.gguf_parts import part_names
from convert_weights.weights import ADAPTER_CONFIG, WEIGHT_SUFFIXES, refuse_other_forms

_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\s]+))?")
# Patterns of the files besides the weights that a conversion reads, copies or refuses.
SMALL_FILES = (
  "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja",
  "chat_template.json", "additional_chat_templates/*.jinja", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
  "*.tiktoken", ADAPTER_CONFIG, "params.json", "README.md",
)  # fmt: skip
# Patterns of weights files, in order of preference: many models have their weights in several formats.
_WEIGHTS = (
  re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
  re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
  re.compile(r".+\.gguf"),
)
_ANSWER_SECONDS = 10  # time limit for the hub's answer


def download(source: str, *, weights: bool = True) -> tuple[Path, str]:
  """Downloads a model `owner/name[@revision][:FILE]` into the cache, except for files that are already there.

  Args:
    source: name of the model. FILE is the name of one of its weights files, or a part of that name that no other
      weights file has, such as `Q8_0`.
    weights: whether to download weights; False: config and tokenizer alone.

  Returns:
    The directory or file to open, and the name `owner/name@commit[:FILE]`.

  Raises:
    ConversionError: `source` is no such name; the hub has no such model or revision; the hub cannot be reached and the
      cache does not have the model; the model is gated and its owner has not granted access; the download fails; or
      `wanted_weights` refuses the model's files.
  """
  named = _ID.fullmatch(source)
  if named is None:
    raise ConversionError(
      f"{source} does not exist. Give a directory, a file, or owner/name[@revision][:FILE] on the hub."
    )
  name, revision = named["name"], named["revision"]
  try:
    info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_ANSWER_SECONDS)
  except RepositoryNotFoundError as error:
    if isinstance(error, GatedRepoError):
      raise _not_let_in(source, name) from error
    raise ConversionError(
      f"{source} is no path on this machine, and the hub says that it has no such model. If it is private, log in "
      "with `hf auth login`."
    ) from error
  except (RevisionNotFoundError, HFValidationError) as error:
    raise ConversionError(f"{source} is no path on this machine, and the hub says: {_last_line(error)}") from error
  except Exception as error:  # each version of huggingface_hub raises the errors of its own HTTP client
    directory = _cached(source, name, revision, error)
    files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    chosen = wanted_weights(source, files, named["file"]) if weights else []
  else:
    files = [sibling.rfilename for sibling in info.siblings or ()]
    chosen = wanted_weights(source, files, named["file"]) if weights else []
    wanted = [*wanted_small_files(files), *chosen]
    try:
      directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
      if _is_refusal(error):
        raise _not_let_in(source, name) from error
      raise ConversionError(f"{source}: the download failed; run it again to go on: {_last_line(error)}") from error
  is_one = bool(chosen) and (named["file"] is not None or chosen[0].endswith(".gguf"))
  return (
    directory / chosen[0] if is_one else directory,
    # In the cache, the directory's name is the commit.
    f"{name}@{directory.name}" + (f":{chosen[0]}" if chosen and named["file"] else ""),
  )


def wanted_small_files(files: Collection[str]) -> list[str]:
  """Returns the files of a model that match SMALL_FILES."""
  return [name for pattern in SMALL_FILES for name in sorted(fnmatch.filter(files, pattern))]


def wanted_weights(source: str, files: Collection[str], chosen: str | None) -> list[str]:
  """Returns the weights files of a model that a conversion reads, all parts of split weights included.

  Args:
    source: name of the model, for messages.
    files: names of all files of the model.
    chosen: name of the weights file, or a part of that name; None takes the preferred format that the model has.

  Raises:
    ConversionError: no weights match, those of several models match, or parts of split weights are missing. If `chosen`
      is None, also for a LoRA adapter and for weights in Meta's or Mistral's original format.
  """
  if chosen is None:
    refuse_other_forms(source, [name for name in files if "/" not in name])
    found = next((found for pattern in _WEIGHTS if (found := sorted(filter(pattern.fullmatch, files)))), [])
    if not found:
      raise ConversionError(f"{source}: the hub has no safetensors, pytorch_model.bin or .gguf file of it.")
    if not found[0].endswith(".gguf"):
      return found
    advice = f"Choose one, as in {source}:{found[0]}"
  else:
    weights = sorted(name for name in files if name.endswith((".gguf", *WEIGHT_SUFFIXES)))
    part = re.compile(rf"(?<![^\W_]){re.escape(chosen)}(?!\w)", re.IGNORECASE)
    found = [chosen] if chosen in weights else [name for name in weights if part.search(name)]
    if not found:
      raise ConversionError("\n".join([f"{source}: no weights of that name.", *listing("weights", weights)]))
    advice = "The name fits several files. Give more of it"
  models = sorted({part_names(name)[0] for name in found})
  if len(models) > 1:
    raise ConversionError("\n".join([f"{source}: {advice}.", *listing("weights", models)]))
  missing = sorted(set(part_names(models[0])) - set(files))
  if missing:
    raise ConversionError("\n".join([f"{source}: incomplete.", *listing("missing parts", missing)]))
  return part_names(models[0])


def _cached(source: str, name: str, revision: str | None, error: Exception) -> Path:
  """Returns the model's directory in the cache. Without one, raises ConversionError that states the hub's `error`."""
  try:
    # Asks for no files, so that an incomplete cache is no error here. The caller checks for the files it needs.
    return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
  except OSError:
    if _is_refusal(error):
      raise _not_let_in(source, name) from error
    raise ConversionError(
      f"{source} is no path on this machine, the hub cannot be reached ({_last_line(error)}), and its cache does not "
      "have it."
    ) from error


def _is_refusal(error: BaseException | None) -> bool:
  """Whether an error, or one that caused it, says that the hub has the model but denies this user access to it."""
  while error is not None:
    if isinstance(error, GatedRepoError) or getattr(getattr(error, "response", None), "status_code", None) in (
      401,
      403,
    ):
      return True
    error = error.__cause__ or error.__context__
  return False


def _not_let_in(source: str, name: str) -> ConversionError:
  return ConversionError(
    f"{source}: the hub denies you access: accept the model's terms on {constants.ENDPOINT}/{name}, log in on this "
    "machine as the same user with `hf auth login`, and run this again."
  )


def _last_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[-1]
