"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from convert_weights.byte_level import byte_level_bpe, named_kind
from convert_weights.errors import ConversionError
from convert_weights.sentencepiece_tokenizer import (
  BYTE,
  CONTROL,
  NORMAL,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
  sentencepiece_bpe,
)
from convert_weights.tokenizer_source import template_and_settings, tokenizer_json
from supra_jax.model.config import ModelConfig

_PREFIX = "tokenizer.ggml."


def tokenizer_files(metadata: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, bytes]:
  """Builds tokenizer.json and tokenizer_config.json, as file name -> contents; empty if the file has no tokenizer.

  Args:
    metadata: metadata of the GGUF file.
    config: config of the model in the file.
    where: name of the file, for messages.

  Raises:
    ConversionError: the kind of tokenizer is not supported, or its tables contradict each other.
  """
  model = metadata.get(_PREFIX + "model", "none")
  if model in ("none", "no_vocab"):
    return {}
  try:
    return _Tables(metadata, config).files()
  except ConversionError as error:
    raise ConversionError(f"{where}: {error} To take another tokenizer, give --tokenizer=DIR.") from error


class _Tables:
  """The keys `tokenizer.ggml.*` of the metadata, checked."""

  def __init__(self, metadata: Mapping[str, Any], config: ModelConfig):
    self._metadata, self._config = metadata, config
    self.tokens = self._list("tokens", str)
    self.types = self._list("token_type", int)
    if len(self.tokens) != len(self.types):
      raise ConversionError(f"{len(self.tokens)} tokens but {len(self.types)} token types.")
    if len(self.tokens) > config.vocab_size:
      raise ConversionError(f"{len(self.tokens)} tokens, more than the {config.vocab_size} rows of the embedding.")
    self.ids = {token: i for i, token in enumerate(self.tokens)}
    if len(self.ids) != len(self.tokens):
      raise ConversionError(f"{len(self.tokens) - len(self.ids)} tokens are listed twice.")

  def get(self, key: str, default: Any = None) -> Any:
    return self._metadata.get(_PREFIX + key, default)

  def files(self) -> dict[str, bytes]:
    match self.get("model"):
      case "gpt2":
        tokenizer, adds_bos = self._byte_level()
      case "llama":
        tokenizer, adds_bos = self._sentencepiece(), True
      case other:
        raise ConversionError(
          f"{_PREFIX}model={other!r} is not supported: only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)."
        )
    tokenizer.add_special_tokens(self._added(CONTROL, UNKNOWN, special=True))
    tokenizer.add_tokens(self._added(USER_DEFINED, special=False))
    self._set_post_processor(tokenizer, adds_bos)
    settings = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "model_max_length": self._config.max_positions,
      **self._named(),
    }
    template = self._metadata.get("tokenizer.chat_template")
    settings |= {"chat_template": template if isinstance(template, str) else None}
    return {"tokenizer.json": tokenizer_json(tokenizer)} | template_and_settings(settings)

  def _byte_level(self) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns the tokenizer, and whether to begin texts with BOS if the file does not say."""
    pre = self.get("pre")
    try:
      kind = named_kind(pre)
    except ConversionError as error:
      raise ConversionError(f"{_PREFIX}pre={pre!r}: {error}") from error
    if self.get("add_space_prefix"):
      raise ConversionError(f"{_PREFIX}add_space_prefix=True is not supported with pre={pre!r}.")
    self._only_types(NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED)
    merges = [tuple(merge.split(" ", 1)) for merge in self._list("merges", str)]
    odd = [merge for merge in merges if len(merge) != 2]
    if odd:
      raise ConversionError(f"{_PREFIX}merges: {odd[0][0]!r} is no pair of tokens.")
    return byte_level_bpe(self.ids, [(left, right) for left, right in merges], pre), kind.adds_bos

  def _sentencepiece(self) -> tokenizers.Tokenizer:
    self._only_types(NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
    scores = self._list("scores", float)
    if len(scores) != len(self.tokens):
      raise ConversionError(f"{len(self.tokens)} tokens but {len(scores)} scores.")
    words = {
      score
      for token, kind, score in zip(self.tokens, self.types, scores, strict=True)
      if kind == NORMAL and len(token) > 1
    }
    if len(words) == 1:
      # Converters that have no scores write the same number for all tokens.
      raise ConversionError(f"{_PREFIX}scores: all are {words.pop()}, which says nothing about the order of merges.")
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
      if self.get(key):
        raise ConversionError(f"{_PREFIX}{key}: SentencePiece's normalisation is not supported.")
    # GGUF marks tokens that were added to the vocabulary as USER_DEFINED. They split the text around them, unlike the
    # USER_DEFINED pieces of SentencePiece, so `files` adds them to the tokenizer instead.
    types = [UNUSED if kind == USER_DEFINED else kind for kind in self.types]
    return sentencepiece_bpe(
      self.tokens, scores, types, dummy_prefix=bool(self.get("add_space_prefix", True)), legacy=True
    )

  def _added(self, *kinds: int, special: bool) -> list[AddedToken]:
    return [
      AddedToken(token, special=special, normalized=False)
      for token, kind in zip(self.tokens, self.types, strict=True)
      if kind in kinds
    ]

  def _set_post_processor(self, tokenizer: tokenizers.Tokenizer, adds_bos: bool) -> None:
    ends = {}
    for name, adds in (("bos", self.get("add_bos_token", adds_bos)), ("eos", self.get("add_eos_token", False))):
      if adds:
        token = self._token(name)
        if token is None:
          raise ConversionError(f"{_PREFIX}add_{name}_token is true, but {_PREFIX}{name}_token_id is missing.")
        ends[name] = token
    if ends:
      bos, eos = ([ends[name]] if name in ends else [] for name in ("bos", "eos"))
      tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B", *eos],
        special_tokens=[(token, self.ids[token]) for token in set(ends.values())],
      )

  def _named(self) -> dict[str, str | None]:
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    return {f"{ours}_token": self._token(theirs) for ours, theirs in names}

  def _token(self, name: str) -> str | None:
    token_id = self.get(f"{name}_token_id")
    return self.tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(self.tokens) else None

  def _only_types(self, *known: int) -> None:
    odd = sorted(set(self.types) - set(known))
    if odd:
      raise ConversionError(f"token types {odd[:20]} are not supported in {_PREFIX}model={self.get('model')!r}.")

  def _list(self, key: str, kind: type) -> list[Any]:
    value = self.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
      raise ConversionError(f"{_PREFIX}{key}: wanted a list of {kind.__name__}.")
    return value
