"""Encodes text to token ids on all cores, in order and in bounded memory, and shows the progress."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from supra_jax.core.files import place
from supra_jax.core.progress import SECONDS, Progress
from supra_jax.data.conversations import TemplateUnfit, encode_conversation
from supra_jax.data.packed import TextEncoder
from supra_jax.data.text import InputFile, Piece, parse, parse_messages, read_pieces
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig

# An input of fewer bytes is packed by one process before worker processes would have started.
SMALL_INPUT = 2**21


def read_tokenizer(directory: str | os.PathLike[str]) -> tuple[dict[str, bytes], ModelConfig]:
  """Returns the files of a model's tokenizer, as `Tokenizer.from_files` takes them, and the model's config.

  Args:
    directory: a model directory, or a directory that holds only a model's config.json and tokenizer files; local or
      gs://.

  Raises:
    ValueError: config.json is not that of a supra_jax model; the tokenizer files are missing; or `core.files.place`
      rejects `directory`.
    OSError: config.json is missing or cannot be read.
  """
  path = place(directory) / "config.json"
  try:
    config = ModelConfig.from_json(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is not the config of a supra_jax model. Convert the model first: python -m "
      f"convert_weights.hf_to_orbax --source={directory} --output=DIR; then give DIR. ({error})"
    ) from error
  found = (path for kind in ("tokenizer*", "chat_template.jinja") for path in place(directory).glob(kind))
  files = {path.name: path.read_bytes() for path in found if path.is_file()}
  if not any(name in files for name in ("tokenizer.json", "tokenizer.model")):
    raise ValueError(f"{directory} has neither a tokenizer.json nor a tokenizer.model.")
  return files, config


class Encoded(NamedTuple):
  """Documents, encoded.

  Attributes:
    ids: integers [n], the tokens of all documents, one document after the other.
    learned: bool [n], whether a model is to learn the token.
    lengths: int64 [documents], number of tokens of each document; 0 for a document without a token.
    bad: an error message for each item that was skipped.
    notes: what a user should know of the documents.
  """

  ids: np.ndarray
  learned: np.ndarray
  lengths: np.ndarray
  bad: list[str]
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A function that encodes a piece of a file; pickled and sent to each worker process once.

  A call raises ValueError if a text cannot be encoded, or if an id is not below `vocab_size`.

  Attributes:
    tokenizer: encodes a text; a `Tokenizer` for messages.
    key: key of a JSON record, or column, that holds the text or the messages.
    messages: whether documents are conversations.
    bos: whether each document starts with the begin-of-text id.
    vocab_size: number of rows of the model's embedding.
    dtype: numpy dtype of the ids.
    skip_bad: whether items that hold no text, or messages that the chat template refuses, are skipped and reported in
      `Encoded.bad`; False raises ValueError.
  """

  tokenizer: TextEncoder
  key: str
  messages: bool
  bos: bool
  vocab_size: int
  dtype: str
  skip_bad: bool

  def __call__(self, piece: Piece) -> Encoded:
    bad: list[str] = []
    notes: dict[str, None] = {}
    ids, learned = [np.zeros(0, self.dtype)], [np.zeros(0, bool)]
    for document, mask, said in (self._conversations if self.messages else self._texts)(piece, bad):
      ids.append(document)
      learned.append(mask)
      notes |= dict.fromkeys(said)
    lengths = np.array([len(document) for document in ids[1:]], np.int64)
    return Encoded(np.concatenate(ids), np.concatenate(learned), lengths, bad, list(notes))

  def _texts(self, piece: Piece, bad: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    for where, text in parse(piece, self.key, bad if self.skip_bad else None):
      try:
        ids = self.tokenizer.encode(text, bos=self.bos)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
      document = self._checked([*ids, self.tokenizer.eos_ids[0]] if len(ids) > self.bos else [], where)
      yield document, np.ones(len(document), bool), []

  def _conversations(self, piece: Piece, bad: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    for where, talk in parse_messages(piece, self.key, bad if self.skip_bad else None):
      try:
        made = encode_conversation(cast(Tokenizer, self.tokenizer), talk)
      except TemplateUnfit as error:
        raise TemplateUnfit(f"{where}: {error}") from error
      except ValueError as error:
        if not self.skip_bad:
          raise ValueError(f"{where}: {error}") from error
        bad.append(f"{where}: {error}")
      else:
        yield self._checked(made.ids, where), made.learned, made.notes

  def _checked(self, ids: list[int], where: str) -> np.ndarray:
    document = np.array(ids, np.int64)
    if len(document) and (document.min() < 0 or document.max() >= self.vocab_size):
      raise ValueError(
        f"{where}: the tokenizer gives ids from {document.min()} to {document.max()}; vocab_size is {self.vocab_size}."
      )
    return document.astype(self.dtype)


# A position in the input: (index of a file, number of items of that file before the position, digest of those items).
Place = tuple[int, int, str]


def digest_of(items: Iterable[bytes | None], before: str = "") -> str:
  """Extends a digest by more items; the result does not depend on how the items are grouped into calls.

  Args:
    items: lines, rows or files, as `Piece.items` has them.
    before: digest of the items that come before `items`; empty if there are none.

  Returns:
    A hexadecimal sha256 of all items so far.
  """
  for item in items:
    before = hashlib.sha256(before.encode() + (b"" if item is None else b":" + item)).hexdigest()
  return before


def pieces_from(
  files: list[InputFile], key: str, at: Place, *, messages: bool = False
) -> Iterator[tuple[tuple[Place, int], Piece]]:
  """Yields ((position after the piece, bytes of the input read so far), piece), from the position `at` on.

  For `key`, `messages` and the ValueErrors see `read_pieces`.
  """
  before = sum(file.size for file in files[: at[0]])
  for number, file in enumerate(files[at[0] :], start=at[0]):
    done, digest = at[1:] if number == at[0] else (0, "")
    for piece in read_pieces(file.path, key, skip=done, messages=messages):
      done, digest = done + len(piece.items), digest_of(piece.items, digest)
      yield ((number, done, digest), before + piece.bytes_read), piece
    before += file.size


def worker_count(workers: int | None, files: list[InputFile]) -> int:
  """Returns the number of worker processes: `workers`, unless that is None.

  For None, returns the number of cores, but 0 if there is a single core or the input has fewer than SMALL_INPUT bytes.
  """
  if workers is not None:
    return workers
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return 0 if cores == 1 or sum(file.size for file in files) < SMALL_INPUT else cores


def encode_in_order(
  pieces: Iterable[tuple[Any, Piece]], encode: Callable[[Piece], Encoded], workers: int
) -> Iterator[tuple[Any, Encoded]]:
  """Yields (label, encoded piece) in the order of the pieces; holds about 2 pieces per worker in memory.

  Args:
    pieces: (label, piece); a label may be anything.
    encode: encodes a piece; pickled for the workers.
    workers: number of worker processes; 0 encodes in this process.

  Raises:
    ChildProcessError: a worker process ended early.
    ValueError: raised by `encode`.
  """
  if not workers:
    for label, piece in pieces:
      yield label, encode(piece)
    return
  # Spawned, since jax starts threads, and a fork of a process with threads may deadlock.
  context = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(workers, context, _start_worker, (encode,))
  waiting: collections.deque[tuple[Any, Any]] = collections.deque()
  try:
    for label, piece in pieces:
      waiting.append((label, pool.submit(_work, piece)))
      if len(waiting) > 2 * workers:
        label, future = waiting.popleft()
        yield label, future.result()
    for label, future in waiting:
      yield label, future.result()
  except BrokenProcessPool as error:
    raise ChildProcessError(
      "A worker process ended early, perhaps for lack of memory, or because the calling script lacks "
      "`if __name__ == '__main__':`. Run the same command again to resume; try fewer workers."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


_encode: Callable[[Piece], Encoded]


def _start_worker(encode: Callable[[Piece], Encoded]) -> None:
  global _encode
  _encode = encode
  # Ctrl-C signals all processes; only the parent handles it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this worker when its parent ends, since the workers of a killed parent would wait forever."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
  os._exit(1)


def _work(piece: Piece) -> Encoded:
  return _encode(piece)


def packing_progress(total: int, first: int = 0, *, seconds: float = SECONDS) -> Progress:
  """Returns a `Progress` of packing in bytes of the input that also shows `tokens` and `tokens_per_second`.

  Args:
    total: size of the whole input in bytes.
    first: number of bytes of the input that an earlier call packed.
    seconds: least time in seconds between two lines where there is no terminal.
  """
  forms = {
    "tokens": lambda value: f"{tqdm.format_sizeof(value)} tokens",
    "tokens_per_second": lambda value: f"{tqdm.format_sizeof(value)} tokens/s",
  }
  bar = "{percentage:3.0f}% {bar} {postfix}, {remaining} left"
  return Progress(total, "packing, {share:.0%} of the input", forms, first=first, seconds=seconds, bar_format=bar)
