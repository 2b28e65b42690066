"""The tokenizer of a model directory -> tokenizer files that give the same ids in every release of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from convert_weights.errors import ConversionError
from convert_weights.tokenizer_probe import first_difference
from convert_weights.tokenizer_source import NAMED, SETTINGS_FILE, as_json, begin_with, content, tokenizer_json
from convert_weights.tokenizer_vocabularies import sentencepiece_vocabulary
from supra_jax.data.tokenizer import Tokenizer

# All releases of transformers have this class, and it follows tokenizer.json; others follow their family's rules.
_CLASS = "PreTrainedTokenizerFast"
_KEPT = (
  *NAMED, "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
  "chat_template",  # a list of several templates; a single template is stored in chat_template.jinja
)  # fmt: skip


def exported_tokenizer(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns the tokenizer files of an export, as file name -> contents.

  Args:
    files: file name -> contents of the tokenizer files of the model directory.
    tokenizer: the tokenizer that these files give.

  Returns:
    tokenizer.json and tokenizer_config.json; tokenizer.model in place of tokenizer.json if no tokenizer.json gives
    the same ids.

  Raises:
    ConversionError: the tokenizer.json to write gives other ids than `tokenizer`.
  """
  settings = json.loads(files.get(SETTINGS_FILE, b"{}"))
  if "tokenizer.json" in files:
    backend = Backend.from_str(files["tokenizer.json"].decode())
  else:
    made = sentencepiece_vocabulary(files["tokenizer.model"], {**settings, "legacy": settings.get("legacy") is True})
    settings = {**made.settings, **settings}
    if made.tokenizer is None:
      settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": _begins(tokenizer)}
      return {"tokenizer.model": files["tokenizer.model"], SETTINGS_FILE: as_json(settings)}
    backend = made.tokenizer
  contents = files.get("tokenizer.json", b"")
  if backend.encode("a").ids != tokenizer.encode("a"):
    begin_with(backend, tokenizer.bos_id if _begins(tokenizer) else None)
    contents = b""
  special = [token.content for token in backend.get_added_tokens_decoder().values()]
  differs = first_difference(tokenizer.encode, lambda text: backend.encode(text).ids, special[:20])
  if differs is not None:
    raise ConversionError(
      f"The tokenizer.json to write gives {differs!r} the ids {backend.encode(differs).ids}; the model's own tokenizer "
      f"gives {tokenizer.encode(differs)}."
    )
  return {"tokenizer.json": contents or tokenizer_json(backend), SETTINGS_FILE: as_json(_settings(settings, backend))}


def _begins(tokenizer: Tokenizer) -> bool:
  return tokenizer.encode("a") != tokenizer.encode("a", bos=False)


def _settings(settings: Mapping[str, Any], backend: Backend) -> dict[str, Any]:
  """Returns the contents of tokenizer_config.json: settings that `_CLASS` reads there rather than in tokenizer.json."""
  kept = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
  kept |= {key: content(kept[key]) for key in NAMED if key in kept}
  listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
  # A list goes under the older name, which all releases read: under the newer name, older releases expect an object.
  if isinstance(listed, list):
    kept["additional_special_tokens"] = [content(token) for token in listed]
  elif isinstance(listed, dict):
    kept["extra_special_tokens"] = {name: content(token) for name, token in listed.items()}
  splits = json.loads(backend.to_str()).get("pre_tokenizer") or {}
  return {
    "tokenizer_class": _CLASS,
    # The class's default includes token_type_ids, which no model here accepts.
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
    **({"add_prefix_space": splits["add_prefix_space"]} if "add_prefix_space" in splits else {}),
    **kept,
  }
