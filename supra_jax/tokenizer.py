"""Text to token ids and back, over a tokenizer.json or a SentencePiece tokenizer.model.

Special tokens: one that is written out in a text (`<|im_end|>`, `</s>`) becomes its one id, as in transformers. The
only id ever added is the one that begins a text; nothing is added at its end. Decoding drops special tokens unless
asked to keep them.

Decoding joins the bytes of the tokens and reads them as UTF-8, U+FFFD for what is no UTF-8; a decoder that streams does
the same work piece by piece. Where transformers decodes a text that the tokens spell in valid UTF-8, this is its text,
without its optional clean-up of spaces.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import sentencepiece
import tokenizers

from supra_jax.config import ModelConfig
from supra_jax.plain_json import to_json

_SPACE = "▁"  # how SentencePiece writes a space
# `normalizer_spec { add_dummy_prefix: false }`. Serialised messages that are joined are merged, so this works where the
# sentencepiece package has no way to switch the prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class _Backend(Protocol):
  """What either kind of tokenizer file comes down to.

  Attributes:
    vocab_size: one more than the largest id.
    special: id -> text of the special tokens.
    prefix: the ids that its own rules put before every text.
    bos_id, eos_id: what the file itself calls the begin and the end of a text.
    leading_spaces: how many spaces at the start of a decoded text are of the tokenizer's own making.
  """

  vocab_size: int
  special: Mapping[int, str]
  prefix: list[int]
  bos_id: int | None
  eos_id: int | None
  leading_spaces: int

  def encode(self, text: str) -> list[int]: ...

  def token_id(self, token: str) -> int | None: ...

  def token(self, token_id: int) -> str | None: ...

  def piece(self, token_id: int) -> bytes: ...


class StreamDecoder:
  """Decodes ids one at a time; what it has returned in all is `Tokenizer.decode` of all ids, after `flush`."""

  def __init__(self, piece: Callable[[int], bytes], leading_spaces: int):
    self._piece = piece
    self._leading_spaces = leading_spaces
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, token_id: int) -> str:
    """Returns the text this id completes, empty while a character is still missing bytes."""
    piece = self._piece(int(token_id))
    if self._leading_spaces and piece:
      kept = piece.lstrip(b" ")
      dropped = min(self._leading_spaces, len(piece) - len(kept))
      self._leading_spaces = 0 if kept else self._leading_spaces - dropped
      piece = piece[dropped:]
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """Returns what is left of an unfinished character: one U+FFFD or nothing."""
    return self._utf8.decode(b"", final=True)


class Tokenizer:
  """The tokenizer of a checkpoint."""

  def __init__(self, backend: _Backend, config: ModelConfig, settings: Mapping[str, Any]):
    """Prefer `from_files`.

    Args:
      backend: the opened tokenizer file.
      config: gives the ids that begin and end a text where the files do not, and the size of the embedding.
      settings: contents of tokenizer_config.json, or empty.

    Raises:
      ValueError: the settings contradict the tokenizer file.
    """
    self._backend = backend
    self._embedding_rows = config.vocab_size
    _check_added_tokens(backend, settings)
    if len(backend.prefix) > 1:
      raise ValueError(f"The tokenizer puts {backend.prefix} before a text: at most one id is supported.")
    named_bos, named_eos = (_named_token(backend, settings, name) for name in ("bos_token", "eos_token"))
    candidates = [*backend.prefix, named_bos, config.bos_token_id, backend.bos_id]
    self._bos_id = next((i for i in candidates if i is not None), None)
    self._eos_ids = config.eos_token_ids or tuple(i for i in (named_eos, backend.eos_id) if i is not None)[:1]
    add_bos = settings.get("add_bos_token")
    self._bos_by_default = bool(backend.prefix) if add_bos is None else bool(add_bos) and self._bos_id is not None
    self._pieces: dict[int, bytes] = {}

  @classmethod
  def from_files(cls, files: Mapping[str, bytes], config: ModelConfig) -> Tokenizer | None:
    """Opens the tokenizer of a checkpoint.

    Args:
      files: name -> contents: `tokenizer.json` or `tokenizer.model`, the first where both are there, and
        `tokenizer_config.json` if there is one.
      config: the model's.

    Returns:
      The tokenizer; None where there is neither file.

    Raises:
      ValueError: a file is corrupt, or asks for something that is not supported.
    """
    settings = _json_object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    if "tokenizer.json" in files:
      return cls(_JsonBackend(files["tokenizer.json"]), config, settings)
    if "tokenizer.model" in files:
      return cls(_SentencePieceBackend(files["tokenizer.model"], settings), config, settings)
    return None

  @property
  def vocab_size(self) -> int:
    """One more than the largest id the tokenizer knows; the model's embedding may have more rows."""
    return self._backend.vocab_size

  @property
  def bos_id(self) -> int | None:
    """The id that begins a text."""
    return self._bos_id

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The ids that end a text."""
    return self._eos_ids

  def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
    """Text to ids.

    Args:
      text: any text; special tokens written out in it become their ids.
      bos: begin with `bos_id`. None does what the checkpoint's own tokenizer does. It is never put before a text that
        begins with it already.

    Raises:
      ValueError: `bos` is True and there is no `bos_id`, or the text has a token the model has no embedding for.
    """
    ids = self._backend.encode(text)
    if self._bos_by_default if bos is None else bos:
      if self._bos_id is None:
        raise ValueError("bos=True: this tokenizer has no token that begins a text.")
      if ids[:1] != [self._bos_id]:
        ids = [self._bos_id, *ids]
    if ids and max(ids) >= self._embedding_rows:
      token = self._backend.token(max(ids))
      raise ValueError(f"Token {token!r} has the id {max(ids)}, but the embedding has {self._embedding_rows} rows.")
    return ids

  def decode(self, ids: Iterable[int], *, keep_special: bool = False, continues: bool = False) -> str:
    """Ids to text.

    Args:
      ids: any ids; those the tokenizer does not know decode to nothing, as an embedding may have unused rows.
      keep_special: write special tokens out.
      continues: the ids follow others, so a space at their start belongs to the text. SentencePiece puts one before a
        whole text, which decoding drops otherwise.

    Raises:
      ValueError: an id is negative.
    """
    stream = self.stream_decoder(keep_special=keep_special, continues=continues)
    return "".join([*map(stream.push, ids), stream.flush()])

  def stream_decoder(self, *, keep_special: bool = False, continues: bool = False) -> StreamDecoder:
    """A decoder for ids that come one at a time; takes what `decode` takes."""

    def piece(token_id: int) -> bytes:
      return b"" if not keep_special and token_id in self._backend.special else self._piece(token_id)

    return StreamDecoder(piece, 0 if continues else self._backend.leading_spaces)

  def _piece(self, token_id: int) -> bytes:
    if token_id < 0:
      raise ValueError(f"Token id {token_id}: wanted a number that is not negative.")
    if token_id not in self._pieces:
      self._pieces[token_id] = self._backend.piece(token_id)
    return self._pieces[token_id]


class _JsonBackend:
  """A tokenizer.json, read by the `tokenizers` package."""

  def __init__(self, contents: bytes):
    description = _json_object("tokenizer.json", contents)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(contents.decode("utf-8"))
    except Exception as error:  # the package raises bare Exceptions
      raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
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
      raise ValueError(f"tokenizer.json encodes 'a' as {plain}, and as {whole} with what it adds to a text.")
    return whole[: starts[0]]

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def token(self, token_id: int) -> str | None:
    return self._tokenizer.id_to_token(token_id)

  def piece(self, token_id: int) -> bytes:
    if token_id in self._added:
      return self._decoder.replaced(self._added[token_id]).encode("utf-8")
    token = self.token(token_id) if token_id < self.vocab_size else None
    return b"" if token is None else self._decoder(token)


class _PieceDecoder:
  """The decoder section of a tokenizer.json as a function of one token.

  Raises:
    ValueError: a step that is not a function of one token, or an unknown one.
  """

  def __init__(self, section: Any):
    self._byte_level = self._byte_fallback = False
    self._replacements: list[tuple[str, str]] = []
    self.leading_spaces = 0
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
    return token

  def __call__(self, token: str) -> bytes:
    if self._byte_level and all(character in _BYTE_OF for character in token):
      return bytes(_BYTE_OF[character] for character in token)
    if self._byte_fallback and _is_byte_piece(token):
      return bytes([int(token[3:5], 16)])
    return self.replaced(token).encode("utf-8")


class _SentencePieceBackend:
  """A tokenizer.model, read by the `sentencepiece` package."""

  def __init__(self, contents: bytes, settings: Mapping[str, Any]):
    self._model = _open_sentencepiece(contents)
    self._bare_model = _open_sentencepiece(contents + _NO_DUMMY_PREFIX)
    model = self._model
    self.vocab_size = model.get_piece_size()
    self.special: Mapping[int, str] = {
      i: model.id_to_piece(i) for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)
    }
    self.bos_id = _id_or_none(model.bos_id())
    self.eos_id = _id_or_none(model.eos_id())
    # Llama's tokenizer begins every text so, unless tokenizer_config.json says otherwise.
    self.prefix = [] if self.bos_id is None else [self.bos_id]
    pieces = model.encode("a", out_type=str)
    if pieces[-1].endswith(_SPACE):
      raise ValueError("tokenizer.model writes spaces as suffixes, which is not supported.")
    self.leading_spaces = int(pieces[0].startswith(_SPACE))
    # transformers' `legacy` behaviour: a new prefix space after every special token.
    self._always_prefix = settings.get("legacy") is True
    by_length = sorted(self.special.values(), key=len, reverse=True)
    self._special_pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None

  def encode(self, text: str) -> list[int]:
    ids: list[int] = []
    parts = self._special_pattern.split(text) if self._special_pattern else [text]
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self._model.piece_to_id(part))
      elif part:
        ids += (self._model if i == 0 or self._always_prefix else self._bare_model).encode(part)
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
  """GPT-2's alphabet: printable bytes stand for themselves, the others for code points from 256 on."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _is_byte_piece(token: str) -> bool:
  return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None


def _json_object(name: str, contents: bytes) -> dict[str, Any]:
  try:
    value = json.loads(contents)
  except ValueError as error:
    raise ValueError(f"{name} is not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{name}: wanted a JSON object, got {type(value).__name__}.")
  return value


def _named_token(backend: _Backend, settings: Mapping[str, Any], name: str) -> int | None:
  token = settings.get(name)
  content = token.get("content") if isinstance(token, dict) else token
  return backend.token_id(content) if isinstance(content, str) else None


def _check_added_tokens(backend: _Backend, settings: Mapping[str, Any]) -> None:
  added = {int(i): entry for i, entry in (settings.get("added_tokens_decoder") or {}).items()}
  contents = {i: entry.get("content") if isinstance(entry, dict) else entry for i, entry in added.items()}
  wrong = [f"{i} {content!r}" for i, content in contents.items() if backend.token(i) != content]
  if wrong:
    raise ValueError(
      f"tokenizer_config.json adds tokens that the tokenizer file does not have: {', '.join(wrong[:20])}."
    )
