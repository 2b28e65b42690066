"""The forms in which vocabularies come: tokenizer.json, tokenizer.model of two kinds, vocab.json, tekken.json."""

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
from supra_jax.data.tokenizer_backends import NO_DUMMY_PREFIX, SentencePieceBackend

# The pre-tokenizer of vocab.json and merges.txt by class, and the class where tokenizer_config.json names none.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
_END_OF_TEXT = "<|endoftext|>"
_LLAMA_3_RANKS = 128_000


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What is made of a vocabulary file.

  Attributes:
    tokenizer: that gives its ids; None where only the file itself does.
    settings: what tokenizer_config.json means where it is silent.
    begins: whether the token that begins a text is to be put before each, unless tokenizer_config.json says otherwise.
    contents: of the file, where it can stay as it is.
    special: the special tokens in such a file, where there is no tokenizer.
  """

  tokenizer: Tokenizer | None
  settings: Mapping[str, Any]
  begins: bool = False
  contents: bytes = b""
  special: frozenset[str] = frozenset()


def _tokenizer_json(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  contents = (directory / "tokenizer.json").read_bytes()
  read_json_object(directory / "tokenizer.json")  # whether it is one
  try:
    return Vocabulary(Tokenizer.from_str(contents.decode("utf-8")), {}, contents=contents)
  except Exception as error:  # the package raises bare Exceptions
    raise ValueError(f"tokenizer.json cannot be read: {error}") from error


def _tokenizer_model(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  path = directory / "tokenizer.model"
  contents = path.read_bytes()
  refuse_pointer(path, contents)
  ranks = _ranks(contents)
  return sentencepiece_vocabulary(contents, settings) if ranks is None else _llama_3(ranks, settings)


def sentencepiece_vocabulary(contents: bytes, settings: Mapping[str, Any]) -> Vocabulary:
  if settings.get("add_prefix_space") is False:
    contents += NO_DUMMY_PREFIX
  legacy = settings.get("legacy", True) is True  # transformers' default
  backend = SentencePieceBackend(contents, {"legacy": legacy})  # refuses what is damaged
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
  """The tokens of a file in tiktoken's form, lines of a token in base64 and its rank; None where it is no such file."""
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
  """Llama 3's tokenizer.model, which holds no special tokens: Meta's code has them, or tokenizer_config.json."""
  if "added_tokens_decoder" in settings:
    return Vocabulary(ranked_bpe(ranks, "llama-bpe"), {}, begins="bos_token" in settings)
  if len(ranks) != _LLAMA_3_RANKS:
    raise ValueError(
      f"tokenizer.model has {len(ranks)} tokens in tiktoken's form, without special ones. Those of Llama 3 "
      f"({_LLAMA_3_RANKS} tokens) are known; of another, wanted tokenizer_config.json with added_tokens_decoder."
    )
  special = {token: len(ranks) + i for i, token in enumerate(_llama_3_special())}
  named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
  return Vocabulary(ranked_bpe(ranks, "llama-bpe", special=special), named, begins=True)


def _llama_3_special() -> list[str]:
  """The 256 special tokens of Llama 3.1 and later; Llama 3.0 has three of these names at reserved ones."""

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
  # What both classes call these tokens where tokenizer_config.json does not.
  named = dict.fromkeys(("eos_token", "unk_token"), _END_OF_TEXT)
  named |= {"bos_token": _END_OF_TEXT} if kind == "gpt-2" else {"pad_token": _END_OF_TEXT}
  return Vocabulary(tokenizer, named, begins=settings.get("add_bos_token") is True)


def _tekken(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
  """Mistral's own form: special tokens come first, the others after them, the last of which are unused."""
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
    raise ValueError(f"tekken.json cuts texts by the pattern {pattern!r}, which is not supported.")
  listed = listed or dict(enumerate(_TEKKEN_SPECIAL))
  special = {listed.get(i, f"<SPECIAL_{i}>"): i for i in range(count)}
  named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  return Vocabulary(ranked_bpe(ranks, "tekken", first_id=count, special=special), named, begins=True)


# Of the first tekken.json, which does not list them.
_TEKKEN_SPECIAL = (
  "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
  "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
  "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip

Reader = Callable[[Path, Mapping[str, Any]], Vocabulary]
# In the order in which they are looked for.
VOCABULARIES: Mapping[str, Reader] = {
  "tokenizer.json": _tokenizer_json,
  "tokenizer.model": _tokenizer_model,
  "vocab.json": _vocab_json,
  "tekken.json": _tekken,
}
