"""Encodes text to token ids and decodes ids to text, with a tokenizer.json or a SentencePiece tokenizer.model.

A special token spelled out in a text (`<|im_end|>`, `</s>`) becomes that token's single id, as in transformers.
Encoding may add the begin-of-text id, but never an end-of-text id. Decoding drops special tokens unless `keep_special`
is set.

Decoding concatenates the bytes of the tokens and decodes them as UTF-8, with U+FFFD for invalid bytes; streaming does
the same piece by piece. For tokens that spell valid UTF-8 the text equals what transformers returns without
clean_up_tokenization_spaces.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from supra_jax.data.chat_template import ChatTemplate, Message, template_of
from supra_jax.data.tokenizer_backends import AS_TEXT, Backend, JsonBackend, SentencePieceBackend, json_object
from supra_jax.model.config import ModelConfig


class StreamDecoder:
  """Decodes ids one at a time.

  The texts that `push` returns for each id and `flush` at the end, concatenated, are what `Tokenizer.decode` returns.
  """

  def __init__(self, piece: Callable[[int], bytes], leading_spaces: int):
    self._piece = piece
    self._leading_spaces = leading_spaces
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, token_id: int) -> str:
    """Returns the text that this id completes; empty while a character still lacks bytes.

    Raises:
      ValueError: the id is negative.
    """
    piece = self._piece(int(token_id))
    if self._leading_spaces and piece:
      kept = piece.lstrip(b" ")
      dropped = min(self._leading_spaces, len(piece) - len(kept))
      self._leading_spaces = 0 if kept else self._leading_spaces - dropped
      piece = piece[dropped:]
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """Returns U+FFFD if the last character is incomplete, else an empty string."""
    return self._utf8.decode(b"", final=True)


class Tokenizer:
  """The tokenizer of a model: encodes, decodes, and knows the begin- and end-of-text ids.

  Attributes:
    template: the checkpoint's chat template; None if it has none.
  """

  def __init__(
    self, backend: Backend, config: ModelConfig, settings: Mapping[str, Any], template: ChatTemplate | None = None
  ):
    """Makes a tokenizer from an opened file; `from_files` also opens the file.

    Args:
      backend: the opened tokenizer file.
      config: config of the model: number of rows of the embedding, end-of-text ids, and the begin-of-text id if
        `settings` and the tokenizer file's own rules name none.
      settings: parsed contents of tokenizer_config.json, or empty.
      template: the checkpoint's chat template; None if it has none.

    Raises:
      ValueError: `settings` adds tokens that the tokenizer file lacks, or the file puts several ids before a text.
    """
    self.template = template
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
    """Opens the tokenizer of a model directory.

    Args:
      files: file name -> contents of `tokenizer.json` or `tokenizer.model`, and of `tokenizer_config.json` if there is
        one, and of `chat_template.jinja`; `tokenizer.json` has priority.
      config: config of the model.

    Returns:
      The tokenizer; None if there is neither a `tokenizer.json` nor a `tokenizer.model`.

    Raises:
      ValueError: a file is corrupt, contradicts another, or asks for something that is not supported.
    """
    settings = json_object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    template = template_of(files)
    if "tokenizer.json" in files:
      return cls(JsonBackend(files["tokenizer.json"]), config, settings, template)
    if "tokenizer.model" in files:
      return cls(SentencePieceBackend(files["tokenizer.model"], settings), config, settings, template)
    return None

  @property
  def vocab_size(self) -> int:
    """One more than the largest id that the tokenizer knows; the model's embedding may have more rows."""
    return self._backend.vocab_size

  @property
  def bos_id(self) -> int | None:
    """The begin-of-text id; None if there is none."""
    return self._bos_id

  @property
  def begins_texts(self) -> bool:
    """Whether `encode` puts `bos_id` before a text unless told otherwise: whether the model was trained with one."""
    return self._bos_by_default

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The end-of-text ids, any of which ends a generated text; may be empty."""
    return self._eos_ids

  def is_special(self, token_id: int) -> bool:
    """Whether an id is that of a special token, or ends a text."""
    return token_id in self._backend.special or token_id in self._eos_ids

  def encode(self, text: str, *, bos: bool | None = None, continues: bool = False) -> list[int]:
    """Encodes a text to ids.

    Args:
      text: any text; special tokens spelled out in it become their ids.
      bos: whether the ids start with `bos_id`, which is added only if the text does not begin with it. None: as the
        tokenizer's own files say.
      continues: whether the text continues an earlier one: there is no begin-of-text id then, nor the space that some
        tokenizers put before a text.

    Raises:
      ValueError: `bos` is True and there is no `bos_id`; the text has a token without a row in the model's embedding,
        or half a surrogate pair.
    """
    return self._encode(text, bos, continues)

  def encode_chat(self, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
    """Encodes a conversation, rendered by the checkpoint's chat template, to ids; for the arguments see `render_chat`.

    Raises:
      ValueError: there is no chat template, or it refuses the messages; or as `encode`.
    """
    return self.encode_rendered(self.render_chat(messages, reply=reply))

  def render_chat(self, messages: Sequence[Message], *, reply: bool = True, **variables: Any) -> str:
    """Returns the text of a conversation, for `encode_rendered`.

    Special tokens are those of the template alone: one that is spelled out in a message stays text, so that nobody ends
    a turn, or begins another's, by writing so.

    Args:
      messages: each {"role": "system" | "user" | "assistant" | ..., "content": text}.
      reply: whether the text ends with what begins an answer.
      **variables: further variables of the template.

    Raises:
      ValueError: there is no chat template, or it refuses the messages.
    """
    if self.template is None:
      raise ValueError("This tokenizer comes without a chat template, which says how messages are put into a text.")

    def as_text(value: Any) -> Any:
      if isinstance(value, str):
        return self._spelled.sub(lambda found: found[0][0] + AS_TEXT + found[0][1:], value)
      if isinstance(value, Mapping):
        return {name: as_text(part) for name, part in value.items()}
      return [as_text(part) for part in value] if isinstance(value, list) else value

    marked = [
      {name: part if name == "role" else as_text(part) for name, part in message.items()}
      if isinstance(message, Mapping)
      else message
      for message in messages
    ]
    return self.template.render(marked, reply=reply, **variables)

  @functools.cached_property
  def _spelled(self) -> re.Pattern[str]:
    """Finds special tokens that are spelled out in a text."""
    by_length = sorted(self._backend.special.values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or "(?!)")

  def encode_rendered(self, text: str, *, continues: bool = False) -> list[int]:
    """Encodes a text of `render_chat`, or a part of it, to ids; for `continues` see `encode`.

    Raises:
      ValueError: as `encode`.
    """
    return self._encode(text, False, continues, marked=AS_TEXT in text)

  def _encode(self, text: str, bos: bool | None, continues: bool, *, marked: bool = False) -> list[int]:
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(
        f"The text has half a surrogate pair, {text[error.start]!r}, as its character {error.start}, which UTF-8 "
        "cannot encode: was the text read with the wrong encoding?"
      ) from error
    ids = self._backend.encode(text, continues=continues, marked=marked)
    if (self._bos_by_default and not continues) if bos is None else bos:
      if self._bos_id is None:
        raise ValueError("bos=True: this tokenizer has no token that begins a text.")
      if ids[:1] != [self._bos_id]:
        ids = [self._bos_id, *ids]
    if ids and max(ids) >= self._embedding_rows:
      token = self._backend.token(max(ids))
      raise ValueError(f"Token {token!r} has the id {max(ids)}, but the embedding has {self._embedding_rows} rows.")
    return ids

  def decode(self, ids: Iterable[int], *, keep_special: bool = False, continues: bool = False) -> str:
    """Decodes ids to text.

    Args:
      ids: any ids; ids that the tokenizer does not know decode to nothing, since an embedding may have unused rows.
      keep_special: whether special tokens are spelled out; False drops them.
      continues: whether the ids continue an earlier text, so that a space at their start is kept. False drops the space
        that SentencePiece adds before a whole text.

    Raises:
      ValueError: an id is negative.
    """
    stream = self.stream_decoder(keep_special=keep_special, continues=continues)
    return "".join([*map(stream.push, ids), stream.flush()])

  def stream_decoder(self, *, keep_special: bool = False, continues: bool = False) -> StreamDecoder:
    """Returns a decoder for ids that come one at a time; for the arguments see `decode`."""

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
