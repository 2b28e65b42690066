"""Opens two kinds of tokenizer files behind one interface, `Backend`: text to ids, and a single id to bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import sentencepiece
import tokenizers

from supra_jax.core.plain_json import to_json

MOST_IDS = 2**24  # larger than any vocabulary
_SPACE = "▁"  # how SentencePiece writes a space
# Stands behind the first character of a special token that is to be text. Unicode says that no text has it.
AS_TEXT = "\ufdd0"
# `normalizer_spec { add_dummy_prefix: false }` as a serialised protobuf message. Protobuf merges these bytes into a
# serialised model that they are appended to: the sentencepiece package has no option to switch the prefix off.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Backend(Protocol):
  """Interface of an opened tokenizer file.

  `encode` adds no begin- or end-of-text id, and with `continues` no space before the text; with `marked`, a special
  token with AS_TEXT in it is text, and AS_TEXT is left out. `token_id` and `token` return None for what the file does
  not have. `piece` returns the bytes that one id decodes to.

  Attributes:
    vocab_size: one more than the largest id.
    special: id -> text of each special token.
    prefix: the ids that the file's own rules put before every text.
    bos_id: the begin-of-text id that the file names; None if it names none.
    eos_id: the end-of-text id that the file names; None if it names none.
    leading_spaces: number of spaces that the tokenizer adds before a text, so that decoding has to drop them.
  """

  vocab_size: int
  special: Mapping[int, str]
  prefix: list[int]
  bos_id: int | None
  eos_id: int | None
  leading_spaces: int

  def encode(self, text: str, *, continues: bool = False, marked: bool = False) -> list[int]: ...

  def token_id(self, token: str) -> int | None: ...

  def token(self, token_id: int) -> str | None: ...

  def piece(self, token_id: int) -> bytes: ...


def open_tokenizer_json(contents: bytes) -> tokenizers.Tokenizer:
  """Opens the contents of a tokenizer.json with the package `tokenizers`.

  Raises:
    ValueError: the file cannot be read, or has ids that are no tokenizer's.
  """
  description = json_object("tokenizer.json", contents)
  vocabulary = (description.get("model") or {}).get("vocab") if isinstance(description.get("model"), dict) else None
  added = description.get("added_tokens")
  ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
  ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
  # The package allocates memory for all ids up to the largest.
  if any(isinstance(i, int) and not 0 <= i <= MOST_IDS for i in ids):
    raise ValueError(f"tokenizer.json cannot be read: it has ids outside 0 to {MOST_IDS}.")
  try:
    return tokenizers.Tokenizer.from_str(contents.decode("utf-8"))
  except BaseException as error:
    # The package raises bare Exceptions, and panics of Rust, which are BaseExceptions.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"tokenizer.json cannot be read: {error}") from error


class JsonBackend:
  """A tokenizer.json, read by the `tokenizers` package."""

  def __init__(self, contents: bytes):
    """Opens the contents of a tokenizer.json.

    Raises:
      ValueError: the file cannot be read, or has a decoder or rules for special tokens that are not supported.
    """
    description = json_object("tokenizer.json", contents)
    self._tokenizer = open_tokenizer_json(contents)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._description = description
    self._others: dict[tuple[bool, bool], tokenizers.Tokenizer] = {}
    added = self._tokenizer.get_added_tokens_decoder()
    self._added = {i: token.content for i, token in added.items()}
    self.special: Mapping[int, str] = {i: token.content for i, token in added.items() if token.special}
    self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
    self.prefix = self._default_prefix()
    self.bos_id: int | None = None
    self.eos_id: int | None = None
    self._decoder = _PieceDecoder(description.get("decoder"))
    self.leading_spaces = self._decoder.leading_spaces

  def _default_prefix(self) -> list[int]:
    plain = self._tokenizer.encode("a", add_special_tokens=False).ids
    whole = self._tokenizer.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
    if not starts:
      raise ValueError(
        f"tokenizer.json encodes 'a' as {plain}, but as {whole} with special tokens, which lacks those ids."
      )
    return whole[: starts[0]]

  def encode(self, text: str, *, continues: bool = False, marked: bool = False) -> list[int]:
    if marked:
      return self._encode_sections(text, continues)
    return self._told(bare=continues).encode(text, add_special_tokens=False).ids

  def _told(self, *, bare: bool, literal: bool = False) -> tokenizers.Tokenizer:
    """Returns the tokenizer; `bare` puts no space before a text, to `literal` special tokens are text."""
    if not (bare or literal):
      return self._tokenizer
    if (bare, literal) not in self._others:
      parts = {name: _without_prefix_space(self._description.get(name)) for name in ("normalizer", "pre_tokenizer")}
      other = tokenizers.Tokenizer.from_str(to_json(self._description | (parts if bare else {})))
      other.no_truncation()
      other.no_padding()
      self._others[bare, literal] = other
    self._others[bare, literal].encode_special_tokens = literal  # which pickling forgets
    return self._others[bare, literal]

  def _encode_sections(self, text: str, continues: bool) -> list[int]:
    """Encodes what lies between special tokens, section by section, as the package does."""
    tokens = {
      token.content: (i, token) for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
    }
    by_length = sorted(tokens, key=len, reverse=True)
    sections = re.split("(" + "|".join(map(re.escape, by_length)) + ")", text) if by_length else [text]
    ids: list[int] = []
    for number, section in enumerate(sections):
      if number % 2:
        ids.append(tokens[section][0])
        continue
      before, after = (tokens[sections[n]][1] if 0 <= n < len(sections) else None for n in (number - 1, number + 1))
      section = section.lstrip() if before is not None and before.rstrip else section
      section = section.rstrip() if after is not None and after.lstrip else section
      bare = (continues or self._first_alone) if number else continues
      literal = AS_TEXT in section
      encoded = self._told(bare=bare, literal=literal).encode(section.replace(AS_TEXT, ""), add_special_tokens=False)
      ids += encoded.ids
    return ids

  @property
  def _first_alone(self) -> bool:
    """Whether a space is put before a text, and not behind special tokens too."""
    section = self._description.get("pre_tokenizer") or {}
    return any(part.get("prepend_scheme") == "first" for part in [section, *section.get("pretokenizers", ())])

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def token(self, token_id: int) -> str | None:
    return self._tokenizer.id_to_token(token_id)

  def piece(self, token_id: int) -> bytes:
    if token_id in self._added:
      return self._decoder.replaced(self._added[token_id]).encode("utf-8")
    token = self.token(token_id) if token_id < self.vocab_size else None
    return b"" if token is None else self._decoder(token)


def _without_prefix_space(section: Any) -> Any:
  """Returns a normalizer or pre_tokenizer of a tokenizer.json without the rules that put a space before a text."""
  if not isinstance(section, dict) or section.get("type") == "Prepend":
    return None
  changed = dict(section)
  for name in ("normalizers", "pretokenizers"):
    if name in section:
      changed[name] = [bare for part in section[name] if (bare := _without_prefix_space(part)) is not None]
  if section.get("type") == "Metaspace":
    changed["prepend_scheme"] = "never"
  if "add_prefix_space" in section:
    changed["add_prefix_space"] = False
  return changed


class _PieceDecoder:
  """The decoder section of a tokenizer.json, as a function from one token to its bytes.

  Raises:
    ValueError: a step of the decoder is not supported, for instance because it depends on more than one token.
  """

  def __init__(self, section: Any):
    # Without a decoder the package joins tokens by spaces.
    self._joined = section is None
    self._byte_level = self._byte_fallback = False
    self._replacements: list[tuple[str, str]] = []
    self.leading_spaces = 0
    if section is None:
      self.leading_spaces = 1
      return
    steps = section.get("decoders", [section]) if isinstance(section, dict) else [section]
    fused = False
    for step in steps:
      kind = step.get("type") if isinstance(step, dict) else None
      if kind == "ByteLevel":
        self._byte_level = True
      elif kind == "ByteFallback":
        self._byte_fallback = True
      elif kind == "Fuse":
        fused = True
      elif kind == "Replace" and not fused and isinstance(step["pattern"].get("String"), str):
        self._replacements.append((step["pattern"]["String"], step["content"]))
      elif kind == "Metaspace":
        self._replacements.append((step["replacement"], " "))
        self.leading_spaces += step.get("prepend_scheme", "always") != "never"
      elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
        self.leading_spaces += step["start"]
      else:
        raise ValueError(f"tokenizer.json has the decoder {to_json(step)}, which is not supported.")

  def replaced(self, token: str) -> str:
    for old, new in self._replacements:
      token = token.replace(old, new)
    return f" {token}" if self._joined else token

  def __call__(self, token: str) -> bytes:
    if self._byte_level and all(character in BYTE_OF for character in token):
      return bytes(BYTE_OF[character] for character in token)
    if self._byte_fallback and _is_byte_piece(token):
      return bytes([int(token[3:5], 16)])
    return self.replaced(token).encode("utf-8")


class SentencePieceBackend:
  """A tokenizer.model, read by the `sentencepiece` package."""

  def __init__(self, contents: bytes, settings: Mapping[str, Any]):
    """Opens the contents of a tokenizer.model.

    Args:
      contents: contents of the file.
      settings: parsed contents of tokenizer_config.json, or empty; only `legacy` is read.

    Raises:
      ValueError: the file cannot be read, or its pieces have the space at their end.
    """
    self._model = _open_sentencepiece(contents)
    self._bare_model = _open_sentencepiece(contents + NO_DUMMY_PREFIX)
    model = self._model
    self.vocab_size = model.get_piece_size()
    self.special: Mapping[int, str] = {
      i: model.id_to_piece(i) for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)
    }
    self.bos_id = _id_or_none(model.bos_id())
    self.eos_id = _id_or_none(model.eos_id())
    # Llama's tokenizer starts every text with the begin-of-text id, unless tokenizer_config.json says otherwise.
    self.prefix = [] if self.bos_id is None else [self.bos_id]
    pieces = model.encode("a", out_type=str)
    if pieces[-1].endswith(_SPACE):
      raise ValueError("tokenizer.model writes spaces as suffixes, which is not supported.")
    self.leading_spaces = int(pieces[0].startswith(_SPACE))
    # `legacy` in transformers: a prefix space is added after every special token, not only at the start of a text.
    self._always_prefix = settings.get("legacy") is True
    by_length = sorted(self.special.values(), key=len, reverse=True)
    self._special_pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None

  def encode(self, text: str, *, continues: bool = False, marked: bool = False) -> list[int]:
    ids: list[int] = []
    parts = self._special_pattern.split(text) if self._special_pattern else [text]
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self._model.piece_to_id(part))
      elif part:
        spaced = not continues if i == 0 else self._always_prefix
        ids += (self._model if spaced else self._bare_model).encode(part.replace(AS_TEXT, "") if marked else part)
    return ids

  def token_id(self, token: str) -> int | None:
    token_id = self._model.piece_to_id(token)
    return token_id if self._model.id_to_piece(token_id) == token else None

  def token(self, token_id: int) -> str | None:
    return self._model.id_to_piece(token_id) if token_id < self.vocab_size else None

  def piece(self, token_id: int) -> bytes:
    token = self.token(token_id)
    if token is None or token_id in self.special:
      return (token or "").encode("utf-8")
    if self._model.is_byte(token_id):
      return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode("utf-8")


def _open_sentencepiece(contents: bytes) -> sentencepiece.SentencePieceProcessor:
  model = sentencepiece.SentencePieceProcessor()
  try:
    if contents and model.LoadFromSerializedProto(contents):
      return model
  except RuntimeError as error:
    raise ValueError(f"tokenizer.model cannot be read: {error}") from error
  raise ValueError("tokenizer.model cannot be read.")


def _id_or_none(token_id: int) -> int | None:
  return token_id if token_id >= 0 else None


def _byte_alphabet() -> dict[str, int]:
  """Returns GPT-2's byte alphabet, {character: byte}; bytes that are not printable have characters from chr(256) on."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _is_byte_piece(token: str) -> bool:
  return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None


def json_object(name: str, contents: bytes) -> dict[str, Any]:
  """Parses the contents of a file as a JSON object.

  Args:
    name: name of the file in error messages.
    contents: contents of the file.

  Raises:
    ValueError: the contents are not JSON, or not an object.
  """
  try:
    value = json.loads(contents)
  except ValueError as error:
    raise ValueError(f"{name} is not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{name}: wanted a JSON object, got {type(value).__name__}.")
  return value
