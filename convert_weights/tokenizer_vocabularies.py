"""Readers of vocabulary files: tokenizer.json, tokenizer.model (SentencePiece or tiktoken), vocab.json, tekken.json."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from convert_weights.byte_level import KINDS, byte_level_bpe, ranked_bpe
from convert_weights.errors import read_json_object, refuse_pointer
from convert_weights.sentencepiece_tokenizer import sentencepiece_bpe
from convert_weights.tokenizer_probe import first_difference
from supra_jax.data.tokenizer_backends import NO_DUMMY_PREFIX, SentencePieceBackend, open_tokenizer_json

# Tokenizer class -> kind of pre-tokenizer (`byte_level.KINDS`) for vocab.json and merges.txt, which do not name it.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
# model_type -> tokenizer class, used if tokenizer_config.json names no class.
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
_END_OF_TEXT = "<|endoftext|>"
_LLAMA_3_RANKS = 128_000


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The contents of a vocabulary file.

  Attributes:
    tokenizer: tokenizer that gives the file's ids; None if no tokenizer of the `tokenizers` package gives them, so that
      the file itself has to be kept.
    settings: defaults for keys that tokenizer_config.json does not have.
    begins: whether every text begins with BOS, unless tokenizer_config.json says otherwise.
    contents: bytes of the file if they can be kept unchanged, else empty.
    special: special tokens of the file; filled in only if `tokenizer` is None.
  """

  tokenizer: Tokenizer | None
  settings: Mapping[str, Any]
  begins: bool = False
  contents: bytes = b""
  special: frozenset[str] = frozenset()


def _tokenizer_json(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  contents = (directory / "tokenizer.json").read_bytes()
  read_json_object(directory / "tokenizer.json")  # raises ConversionError if the file is no JSON object
  return Vocabulary(open_tokenizer_json(contents), {}, contents=contents)


def _tokenizer_model(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  path = directory / "tokenizer.model"
  contents = path.read_bytes()
  refuse_pointer(path, contents)
  ranks = _ranks(contents)
  return sentencepiece_vocabulary(contents, settings) if ranks is None else _llama_3(ranks, settings)


def sentencepiece_vocabulary(contents: bytes, settings: Mapping[str, Any]) -> Vocabulary:
  """Reads a SentencePiece model.

  Args:
    contents: bytes of tokenizer.model.
    settings: contents of tokenizer_config.json, which may set `legacy` and `add_prefix_space`.

  Returns:
    The vocabulary. Its `tokenizer` is set only if this tokenizer gives the same ids as the sentencepiece package on all
    hard texts (`tokenizer_probe`); otherwise `tokenizer` is None and `contents` are the file's bytes.

  Raises:
    ValueError: the file is damaged.
  """
  if settings.get("add_prefix_space") is False:
    contents += NO_DUMMY_PREFIX
  legacy = settings.get("legacy", True) is True  # transformers' default
  backend = SentencePieceBackend(contents, {"legacy": legacy})  # raises ValueError if the file is damaged
  model = sentencepiece_model_pb2.ModelProto.FromString(contents)  # type: ignore[attr-defined]
  pieces, scores, types = zip(*((piece.piece, piece.score, piece.type) for piece in model.pieces), strict=True)
  tokenizer = sentencepiece_bpe(
    pieces, scores, types, dummy_prefix=model.normalizer_spec.add_dummy_prefix, legacy=legacy
  )
  ids = {"bos_token": backend.bos_id, "eos_token": backend.eos_id, "unk_token": model.trainer_spec.unk_id}
  named = {name: pieces[i] for name, i in ids.items() if i is not None and i >= 0}

  def encode(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids

  special = list(backend.special.values())
  if first_difference(backend.encode, encode, special[:20]) is not None:
    return Vocabulary(None, {"legacy": legacy} | named, contents=contents, special=frozenset(special))
  return Vocabulary(tokenizer, named, begins="bos_token" in named)


def _ranks(contents: bytes) -> list[bytes] | None:
  """Returns the tokens of a tiktoken file, by rank; None if the file is of another kind.

  Each line of such a file is a token in base64, a space and the token's rank.
  """
  tokens = []
  for rank, line in enumerate(contents.splitlines()):
    token, _, number = line.partition(b" ")
    if number != str(rank).encode():
      return None
    try:
      tokens.append(base64.b64decode(token, validate=True))
    except binascii.Error:
      return None
  return tokens or None


def _llama_3(ranks: list[bytes], settings: Mapping[str, Any]) -> Vocabulary:
  """Reads Llama 3's tokenizer.model, without special tokens: tokenizer_config.json or Meta's code defines them."""
  if "added_tokens_decoder" in settings:
    return Vocabulary(ranked_bpe(ranks, "llama-bpe"), {}, begins="bos_token" in settings)
  if len(ranks) != _LLAMA_3_RANKS:
    raise ValueError(
      f"tokenizer.model is a tiktoken file of {len(ranks)} tokens, which does not list its special tokens. Only those "
      f"of Llama 3 ({_LLAMA_3_RANKS} tokens) are known here: wanted a tokenizer_config.json with added_tokens_decoder."
    )
  special = {token: len(ranks) + i for i, token in enumerate(_llama_3_special())}
  named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
  return Vocabulary(ranked_bpe(ranks, "llama-bpe", special=special), named, begins=True)


def _llama_3_special() -> list[str]:
  """Returns the 256 special tokens of Llama 3.1 and later, by id. In Llama 3.0, three of them are reserved tokens."""

  def reserved(first: int, last: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(first, last)]

  return [
    *("<|begin_of_text|>", "<|end_of_text|>"), *reserved(0, 2), "<|finetune_right_pad_id|>", *reserved(2, 3),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"), *reserved(3, 248),
  ]  # fmt: skip


def _vocab_json(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  merges_path = directory / "merges.txt"
  if not merges_path.is_file():
    raise ValueError("vocab.json is there, merges.txt is missing.")
  vocab = read_json_object(directory / "vocab.json")
  if not all(type(i) is int for i in vocab.values()):
    raise ValueError("vocab.json: wanted an object of token -> id.")
  config = directory / "config.json"
  model_type = read_json_object(config).get("model_type") if config.is_file() else None
  name = settings.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(model_type))
  kind = _CLASSES.get(str(name).removesuffix("Fast"))
  if kind is None:
    raise ValueError(
      f"vocab.json and merges.txt of a {name or 'tokenizer without a tokenizer_class'}: only those of "
      f"{', '.join(_CLASSES)} are read. Let transformers write a tokenizer.json."
    )
  lines = merges_path.read_text(encoding="utf-8").split("\n")
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  if not all(len(merge) == 2 for merge in merges):
    raise ValueError("merges.txt: wanted two tokens a line.")
  tokenizer = byte_level_bpe(vocab, [(left, right) for left, right in merges], kind)
  # Defaults of the two classes for tokens that tokenizer_config.json does not name.
  named = dict.fromkeys(("eos_token", "unk_token"), _END_OF_TEXT)
  named |= {"bos_token": _END_OF_TEXT} if kind == "gpt-2" else {"pad_token": _END_OF_TEXT}
  return Vocabulary(tokenizer, named, begins=settings.get("add_bos_token") is True)


def _tekken(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  """Reads Mistral's tekken.json. The special tokens have the first ids; tokens past default_vocab_size are unused."""
  description = read_json_object(directory / "tekken.json")
  try:
    config = description["config"]
    count, size = config["default_num_special_tokens"], config["default_vocab_size"]
    ranks = [base64.b64decode(token["token_bytes"]) for token in description["vocab"][: size - count]]
    listed = {token["rank"]: token["token_str"] for token in description.get("special_tokens") or ()}
    pattern = config["pattern"]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"tekken.json is not what Mistral writes: {error!r}.") from error
  if pattern != KINDS["tekken"].pattern:
    raise ValueError(f"tekken.json splits texts by the pattern {pattern!r}, which is not supported.")
  listed = listed or dict(enumerate(_TEKKEN_SPECIAL))
  special = {listed.get(i, f"<SPECIAL_{i}>"): i for i in range(count)}
  named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  return Vocabulary(ranked_bpe(ranks, "tekken", first_id=count, special=special), named, begins=True)


# Special tokens, by id, of the first tekken.json files, which do not list them.
_TEKKEN_SPECIAL = (
  "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
  "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
  "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip

Reader = Callable[[Path, Mapping[str, Any]], Vocabulary]
# File name -> reader, in order of preference: the first file that exists is read.
VOCABULARIES: Mapping[str, Reader] = {
  "tokenizer.json": _tokenizer_json,
  "tokenizer.model": _tokenizer_model,
  "vocab.json": _vocab_json,
  "tekken.json": _tekken,
}
