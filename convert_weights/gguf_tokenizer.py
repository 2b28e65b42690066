"""The tokenizer inside a GGUF file -> a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from convert_weights.errors import ConversionError
from supra_jax.config import ModelConfig
from supra_jax.plain_json import to_json

_PREFIX = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _smollm() -> pre_tokenizers.PreTokenizer:
  # Without the digits rule "7." after blank lines becomes other tokens than in training.
  return pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )


_PRE_TOKENIZERS = {"smollm": _smollm}


def tokenizer_files(metadata: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, bytes]:
  """Builds tokenizer.json and tokenizer_config.json; empty where the file carries no tokenizer.

  Raises:
    ConversionError: a kind of tokenizer that is not supported, or its tables do not fit together.
  """
  model = metadata.get(_PREFIX + "model", "none")
  if model in ("none", "no_vocab"):
    return {}
  if model != "gpt2":
    raise ConversionError(f"{where}: {_PREFIX}model={model!r} is not supported: only 'gpt2' (byte-level BPE).")
  pre = metadata.get(_PREFIX + "pre")
  if pre not in _PRE_TOKENIZERS:
    raise ConversionError(f"{where}: {_PREFIX}pre={pre!r} is not supported: only {', '.join(_PRE_TOKENIZERS)}.")
  tokens, types, merges = (_strings_or_types(metadata, key, where) for key in ("tokens", "token_type", "merges"))
  _check_tables(tokens, types, merges, config, where)
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
  )
  add_prefix_space = bool(metadata.get(_PREFIX + "add_space_prefix", False))
  if add_prefix_space:
    raise ConversionError(f"{where}: {_PREFIX}add_space_prefix=True is not supported with pre={pre!r}.")
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
  )
  tokenizer.add_tokens(
    [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
  )
  named = {
    f"{ours}_token": tokens[metadata[key]]
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    if 0 <= metadata.get(key := f"{_PREFIX}{theirs}_token_id", -1) < len(tokens)
  }
  if metadata.get(_PREFIX + "add_bos_token", False):
    if config.bos_token_id is None:
      raise ConversionError(f"{where}: {_PREFIX}add_bos_token=True, but {_PREFIX}bos_token_id is missing.")
    bos = tokens[config.bos_token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, config.bos_token_id)]
    )
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": config.max_positions,
    **named,
    "chat_template": metadata.get("tokenizer.chat_template"),
  }
  settings = {key: value for key, value in settings.items() if value is not None}
  return {
    "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
    "tokenizer_config.json": (to_json(settings, indent=2, ensure_ascii=False) + "\n").encode(),
  }


def _strings_or_types(metadata: Mapping[str, Any], key: str, where: str) -> list[Any]:
  value = metadata.get(_PREFIX + key)
  kind = int if key == "token_type" else str
  if not isinstance(value, list) or not all(type(item) is kind for item in value):
    raise ConversionError(f"{where}: {_PREFIX}{key}: wanted a list of {kind.__name__}.")
  return value


def _check_tables(tokens: list[str], types: list[int], merges: list[str], config: ModelConfig, where: str) -> None:
  if len(tokens) != len(types):
    raise ConversionError(f"{where}: {len(tokens)} tokens but {len(types)} token types.")
  if len(tokens) > config.vocab_size:
    raise ConversionError(f"{where}: {len(tokens)} tokens, more than the {config.vocab_size} rows of the embedding.")
  vocabulary = set(tokens)
  if len(vocabulary) != len(tokens):
    raise ConversionError(f"{where}: {len(tokens) - len(vocabulary)} tokens are listed twice.")
  odd = sorted(set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED})
  if odd:
    raise ConversionError(f"{where}: token types {odd} are not supported in a byte-level BPE.")
  for merge in merges:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocabulary:
      raise ConversionError(f"{where}: the merge {merge!r} names tokens that are not in the vocabulary.")
