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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from supra_jax.data.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend, json_object
from supra_jax.model.config import ModelConfig


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

  def __init__(self, backend: Backend, config: ModelConfig, settings: Mapping[str, Any]):
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
    settings = json_object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    if "tokenizer.json" in files:
      return cls(JsonBackend(files["tokenizer.json"]), config, settings)
    if "tokenizer.model" in files:
      return cls(SentencePieceBackend(files["tokenizer.model"], settings), config, settings)
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
      ValueError: `bos` is True and there is no `bos_id`; the text has a token the model has no embedding for, or half a
        surrogate pair.
    """
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(
        f"The text has half a surrogate pair, {text[error.start]!r}, as its character {error.start}, and so no UTF-8: "
        "was it read as another encoding?"
      ) from error
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


def _named_token(backend: Backend, settings: Mapping[str, Any], name: str) -> int | None:
  token = settings.get(name)
  content = token.get("content") if isinstance(token, dict) else token
  return backend.token_id(content) if isinstance(content, str) else None


def _check_added_tokens(backend: Backend, settings: Mapping[str, Any]) -> None:
  added = {int(i): entry for i, entry in (settings.get("added_tokens_decoder") or {}).items()}
  contents = {i: entry.get("content") if isinstance(entry, dict) else entry for i, entry in added.items()}
  wrong = [f"{i} {content!r}" for i, content in contents.items() if backend.token(i) != content]
  if wrong:
    raise ValueError(
      f"tokenizer_config.json adds tokens that the tokenizer file does not have: {', '.join(wrong[:20])}."
    )
