"""Tokenizer files of a checkpoint, in any form -> tokenizer.json, tokenizer_config.json and chat template.

Every file that transformers reads is read here and goes into tokenizer.json, or is refused by name: vocabularies in
several forms, files that add tokens to them, chat templates, and generation_config.json.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from convert_weights.errors import ConversionError, read_json_object
from convert_weights.tokenizer_vocabularies import VOCABULARIES
from supra_jax.core.plain_json import to_json

SETTINGS_FILE, GENERATION_FILE, TEMPLATE_FILE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_PADDING = "pad_token_id"
# Keys of the special tokens, in the order in which transformers adds tokens that the vocabulary lacks.
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTED = ("extra_special_tokens", "additional_special_tokens")
# Classes that follow tokenizer.json and ignore `add_bos_token` in the settings.
_DEAF = ("PreTrainedTokenizer", "TokenizersBackend", "Qwen2Tokenizer", "GPT2Tokenizer")
# Vocabulary files of tokenizers that are not supported.
_FOREIGN = re.compile(r"spiece\.model|sentencepiece\.bpe\.model|vocab\.txt|.*\.tiktoken|merges\.txt")


def tokenizer_files(directory: Path) -> dict[str, bytes]:
  """Returns the tokenizer and generation files of a checkpoint, in the form in which a model directory stores them.

  Args:
    directory: directory of the checkpoint.

  Returns:
    File name -> contents. The files are tokenizer.json (or tokenizer.model, if no tokenizer.json gives the same ids),
    tokenizer_config.json, chat_template.jinja and generation_config.json; those that the checkpoint lacks are absent.

  Raises:
    ConversionError: a file is damaged, contradicts another file, or is of an unsupported kind.
  """
  files = generation_file(directory)
  settings = _settings(directory)
  name = next((name for name in VOCABULARIES if (directory / name).is_file()), None)
  if name is None:
    _refuse_what_is_left(directory)
    return files
  try:
    vocabulary = VOCABULARIES[name](directory, settings)
    settings = {**vocabulary.settings, **settings}
    added = _added_tokens(directory, settings)
    if vocabulary.tokenizer is None:
      missing = [repr(token) for token in added if token not in vocabulary.special]
      if missing:
        raise ValueError(f"tokens cannot be added to this {name}: {', '.join(missing[:20])}.")
      files[name] = vocabulary.contents
    else:
      changed = _add(vocabulary.tokenizer, added) | _set_prefix_space(vocabulary.tokenizer, settings)
      if vocabulary.begins and settings.get("add_bos_token") is not False:
        begin_with(vocabulary.tokenizer, vocabulary.tokenizer.token_to_id(content(settings["bos_token"])))
      keeps = vocabulary.contents and not changed
      files["tokenizer.json"] = vocabulary.contents if keeps else tokenizer_json(vocabulary.tokenizer)
  except ValueError as error:
    raise ConversionError(f"{directory}: the tokenizer cannot be used: {error}") from error
  return files | template_and_settings(settings)


def generation_file(directory: Path) -> dict[str, bytes]:
  """Returns generation_config.json as {file name: contents}; empty if there is nothing to store.

  Older checkpoints have pad_token_id in config.json, from where this function copies it.

  Raises:
    ConversionError: generation_config.json or config.json cannot be read as a JSON object.
  """
  found, config = (_object(directory / name) for name in (GENERATION_FILE, "config.json"))
  if found.get(_PADDING) is None and config.get(_PADDING) is not None:
    found[_PADDING] = config[_PADDING]
  # These keys say which program wrote the file; they do not affect generation.
  found = {key: value for key, value in found.items() if key not in ("_from_model_config", "transformers_version")}
  return {GENERATION_FILE: as_json(found)} if found else {}


def template_and_settings(settings: Mapping[str, Any]) -> dict[str, bytes]:
  """Splits settings into the files tokenizer_config.json and, for a single chat template, chat_template.jinja."""
  rest = {key: value for key, value in settings.items() if value is not None}
  template = rest.get("chat_template")
  files = {}
  if isinstance(template, str):
    files[TEMPLATE_FILE] = rest.pop("chat_template").encode()
  if rest:
    files[SETTINGS_FILE] = as_json(rest)
  return files


def begin_with(tokenizer: Tokenizer, token_id: int | None) -> None:
  """Sets the post-processor to put `token_id` (None: nothing) before every text, and nothing after a text."""
  if token_id is None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return
  token = tokenizer.id_to_token(token_id)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, token_id)]
  )


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
  """Returns the contents of the tokenizer.json of a tokenizer."""
  return (tokenizer.to_str(pretty=True) + "\n").encode()


def as_json(values: Mapping[str, Any]) -> bytes:
  """Returns the contents of a JSON file with these values, in UTF-8, indented by two spaces."""
  return (to_json(values, indent=2, ensure_ascii=False) + "\n").encode()


def content(token: Any) -> str:
  """Returns the text of a token. Settings hold either the text itself or an object with the text under `content`.

  Raises:
    ValueError: `token` is neither a text nor such an object.
  """
  text = token.get("content") if isinstance(token, dict) else token
  if not isinstance(text, str):
    raise ValueError(f"a token is {token!r}: wanted a text, or an object with one under 'content'.")
  return text


def _settings(directory: Path) -> dict[str, Any]:
  """Reads tokenizer_config.json, and adds special_tokens_map.json (older) and chat template files (newer)."""
  settings = _object(directory / SETTINGS_FILE)
  # If added_tokens_decoder lists all added tokens, transformers ignores special_tokens_map.json.
  if "added_tokens_decoder" not in settings:
    older = _object(directory / _SPECIAL_MAP)
    for name in _LISTED:
      if isinstance(listed := settings.get(name), list) and isinstance(older.get(name), list):
        older[name] = [*listed, *(token for token in older[name] if token not in listed)]
    settings |= older
  if str(settings.get("tokenizer_class")).removesuffix("Fast") in _DEAF and (directory / "tokenizer.json").is_file():
    settings.pop("add_bos_token", None)
  if settings.get("legacy") is None:
    settings.pop("legacy", None)
  templates = {"default": directory / TEMPLATE_FILE} if (directory / TEMPLATE_FILE).is_file() else {}
  templates |= {path.stem: path for path in sorted((directory / _TEMPLATES).glob("*.jinja"))}
  if list(templates) == ["default"]:
    settings["chat_template"] = _text(templates["default"])
  elif templates:
    settings["chat_template"] = [{"name": name, "template": _text(path)} for name, path in templates.items()]
  return settings


def _object(path: Path) -> dict[str, Any]:
  return read_json_object(path) if path.is_file() else {}


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ConversionError(f"{path}: not UTF-8 text: {error}.") from error


def _refuse_what_is_left(directory: Path) -> None:
  """Raises ConversionError if the directory holds tokenizer files, but no supported vocabulary."""
  names = sorted(path.name for path in directory.glob("*") if path.is_file())
  left = [name for name in names if _FOREIGN.fullmatch(name)]
  left = left or [name for name in names if name in (SETTINGS_FILE, _SPECIAL_MAP, _ADDED)]
  if left:
    raise ConversionError(
      f"{directory}: holds {', '.join(left)}, but none of the vocabularies that are read, {', '.join(VOCABULARIES)}. "
      "Let transformers write one, AutoTokenizer.from_pretrained(...).save_pretrained(DIR), and give --tokenizer=DIR."
    )


@dataclasses.dataclass
class _Added:
  """A token that files other than the vocabulary describe.

  Attributes:
    token_id: id of the token; None if no file gives one.
    flags: flags of `tokenizers.AddedToken` (single_word, lstrip, rstrip, normalized) in added_tokens_decoder; None if
      the token is not listed there.
    own_flags: the same flags where a setting such as `bos_token` names the token; used if the token is not listed in
      added_tokens_decoder and the vocabulary lacks it.
    special: whether the token is a special token.
  """

  token_id: int | None = None
  flags: Mapping[str, bool] | None = None
  own_flags: Mapping[str, bool] = dataclasses.field(default_factory=lambda: _flags({}))
  special: bool = False


def _added_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[str, _Added]:
  """Returns the tokens that files other than the vocabulary describe, in the order in which transformers adds them.

  Raises:
    ValueError: added_tokens_decoder or added_tokens.json has the wrong form.
  """
  listed = settings.get("added_tokens_decoder")
  if listed is None:
    ids = _object(directory / _ADDED)
    if not all(type(i) is int for i in ids.values()):
      raise ValueError(f"{_ADDED}: wanted an object of token -> id.")
    added = {token: _Added(i) for token, i in sorted(ids.items(), key=lambda item: item[1])}
  elif isinstance(listed, dict):
    in_order = sorted(((int(i), entry) for i, entry in listed.items()), key=lambda item: item[0])
    if not all(isinstance(entry, dict) for _, entry in in_order):
      raise ValueError(f"{SETTINGS_FILE}: added_tokens_decoder: wanted an object for each token.")
    added = {content(entry): _Added(i, _flags(entry), special=entry.get("special") is True) for i, entry in in_order}
  else:
    raise ValueError(f"{SETTINGS_FILE}: added_tokens_decoder: wanted an object of id -> token.")
  for token in _named_tokens(settings):
    known = added.setdefault(content(token), _Added())
    known.special = True
    if isinstance(token, dict):
      known.own_flags = _flags(token)
  return added


def _named_tokens(settings: Mapping[str, Any]) -> list[Any]:
  """Returns the special tokens that a key of NAMED names or a key of _LISTED lists; these keys give no ids."""
  named = [settings.get(name) for name in NAMED]
  for name in _LISTED:
    listed = settings.get(name) or []
    named += listed.values() if isinstance(listed, dict) else listed
  return [token for token in named if token]


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
  return {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}


def _add(tokenizer: Tokenizer, added: Mapping[str, _Added]) -> bool:
  """Adds tokens that the tokenizer lacks, and updates tokens whose flags differ. Returns whether anything changed.

  Raises:
    ValueError: the tokenizer gives a token another id than the checkpoint's files do.
  """
  known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
  changed = False
  for text, said in added.items():
    before = known.get(text)
    found = said.own_flags if before is None else {name: getattr(before, name) for name in said.own_flags}
    flags = dict(found if said.flags is None else said.flags)
    if _is_sentencepiece(tokenizer.normalizer):
      # Otherwise the normaliser prepends a space to the token too, and the token matches only after a space.
      flags["normalized"] = False
    special = said.special or (said.flags is None and before is not None and before.special)
    token = AddedToken(text, special=special, **flags)
    if repr(token) != repr(before):
      tokenizer.add_tokens([token])
      changed = True
    if said.token_id not in (None, got := tokenizer.token_to_id(text)):
      raise ValueError(f"{text!r} has the id {said.token_id} in the files, but the tokenizer gives it the id {got}.")
  return changed


def _is_sentencepiece(normalizer: Any) -> bool:
  """Whether a normaliser prepends or replaces characters, as SentencePiece's does, unlike NFC or lower-casing."""
  steps: Any = normalizer  # iterable, though its type does not say so
  return isinstance(normalizer, normalizers.Sequence) and any(
    isinstance(step, normalizers.Prepend | normalizers.Replace) for step in steps
  )


def _set_prefix_space(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> bool:
  """Applies the setting `add_prefix_space` to a byte-level tokenizer. Returns whether anything changed."""
  wanted, splits = settings.get("add_prefix_space"), tokenizer.pre_tokenizer
  if not isinstance(wanted, bool) or not isinstance(splits, pre_tokenizers.ByteLevel):
    return False
  changed = splits.add_prefix_space != wanted
  splits.add_prefix_space = wanted
  tokenizer.pre_tokenizer = splits
  return changed
