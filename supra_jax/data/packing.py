"""Packs text into rows, on all cores; a killed job resumes after its last finished file and writes the same bytes.

OUTPUT/source.json    the arguments and the input files
OUTPUT/train/         a packed directory, see `data.packed`
OUTPUT/heldout/       another packed directory, of every `heldout_every`-th document; absent if heldout_every is 0

While it is being written, the directory is called OUTPUT.partial, and its journal.npz records the position in the input
up to which the finished files of rows reach. An OUTPUT in a bucket is made in the local cache directory, then copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supra_jax.core import bucket
from supra_jax.core.files import (
  UNFINISHED,
  AnyPath,
  absolute,
  locked,
  move_files,
  new_directory,
  occupied,
  rename_directory,
)
from supra_jax.core.plain_json import to_json
from supra_jax.data.encoding import Encoder, encode_in_order, packing_progress, pieces_from, worker_count
from supra_jax.data.packed import META_FILE, Documents, PackedInfo, TextEncoder, load_info, tokenizer_fingerprint
from supra_jax.data.packing_job import JOURNAL_FILE, NOTHING_BAD, SOURCE_FILE, Job, column_of, differences
from supra_jax.data.text import directories_of, find_files

SHARD_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Result of `prepare`.

  Attributes:
    train: description of OUTPUT/train.
    heldout: description of OUTPUT/heldout; None if nothing is held out.
    tokens_per_second: speed of packing; None if the output was finished before the call.
    bad: number of lines and rows that were skipped because they hold no text.
    bad_first: error messages of the first few skipped lines and rows.
    notes: what a user should know of the conversations.
    files: number of files that were read.
  """

  train: PackedInfo
  heldout: PackedInfo | None
  tokens_per_second: float | None
  bad: int = 0
  bad_first: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  files: int = 0

  def lines(self, output: str) -> list[str]:
    """Returns what to tell a user of it; `output` is the directory's name."""
    said = []
    for name, info in (("train", self.train), ("heldout", self.heldout)):
      if info is not None:
        learned = "" if info.learned_tokens is None else f", {info.learned_tokens:,} of them answers"
        said.append(
          f"{output}/{name}: {info.documents:,} documents, {info.tokens:,} tokens in {info.rows:,} rows of "
          f"{info.sequence_length:,}{learned}, {info.dropped_tokens:,} dropped."
        )
    if self.bad:
      more = f"; and {self.bad - len(self.bad_first):,} more" if self.bad > len(self.bad_first) else ""
      said.append(f"{self.bad:,} skipped, which cannot be packed: {'; '.join(self.bad_first)}{more}")
    speed = self.tokens_per_second
    read = f"{self.files:,} file{'s' * (self.files != 1)} read, {speed:,.0f} tokens/s." if speed is not None else ""
    return [*said, *self.notes, read or "All was packed before."]


def prepare(
  input: str,
  tokenizer: TextEncoder,
  output: str | os.PathLike[str],
  *,
  vocab_size: int,
  sequence_length: int,
  text_key: str = "text",
  messages_key: str = "",
  documents: Documents | None = None,
  bos: bool = False,
  heldout_every: int = 0,
  skip_bad: bool = False,
  workers: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> Prepared:
  """Packs text into rows of sequence_length + 1 tokens; resumes a call that was killed, and keeps finished output.

  Each document is followed by the first of the tokenizer's end-of-text ids; documents without a token are skipped. The
  last token of a row is also the first of the next row, so that every token of OUTPUT/train (and of OUTPUT/heldout) but
  the very first is the token to predict exactly once. Conversations are rendered by the tokenizer's chat template, with
  no end-of-text id behind them; rows then say which tokens are an answer's, see `conversations`. The bytes written
  depend only on the text, the tokenizer and the arguments except `workers`.

  Worker processes are spawned: with workers, a script that calls `prepare` has to be guarded by
  `if __name__ == "__main__":`.

  Args:
    input: glob of files, or `pydoc:topics`, as `text.find_files` takes it.
    tokenizer: encodes the documents; pickled for the workers. Conversations need a `Tokenizer` with a chat template.
    output: the directory to make, local or gs://.
    vocab_size: number of rows of the model's embedding; ids have to be below this number.
    sequence_length: T, number of tokens to predict per row.
    text_key: the key of JSON records, or the column, that holds the text.
    messages_key: the key or column that holds conversations, as `conversations.messages_of` takes them, in place of
      text. Empty: the documents are texts.
    documents: how documents share a row; `separate` also stores the number of each token's document in the row, from 1.
      None: `separate` for conversations, else `join`.
    bos: whether each document starts with the begin-of-text id; a conversation starts as the template says.
    heldout_every: N; every N-th document goes to OUTPUT/heldout. 0: none does.
    skip_bad: whether lines and rows that hold no text, or messages that the chat template refuses, are skipped and
      counted; False raises ValueError at the first.
    workers: number of processes that encode; 0 encodes in this process. None: one per core, or 0 if the input is small.
    shard_bytes: approximate size of a file of rows in bytes, before compression.

  Raises:
    FileExistsError: `output` holds something other than packed text.
    FileNotFoundError: no file matches `input`, or a file of a finished `output` is missing.
    ValueError: an argument is out of range; an item of the input cannot be read (the message names file and line); the
      input is too small for a row; the tokenizer lacks an end-of-text id, or a begin-of-text id with `bos`, or gives an
      id of vocab_size or more; `output` or OUTPUT.partial was made with other arguments; `output` was made from another
      text; OUTPUT.partial is damaged, holds other files or is being written by another process; or `core.files.place`
      rejects `output`.
    ChildProcessError: a worker process ended early.
    OSError: a file cannot be written or copied.
  """
  documents = documents or ("separate" if messages_key else "join")
  if sequence_length < 1 or documents not in ("join", "separate"):
    raise ValueError(
      f"sequence_length={sequence_length}, documents={documents!r}: wanted a positive number, 'join' or 'separate'."
    )
  if heldout_every < 0 or heldout_every == 1:
    raise ValueError(f"heldout_every={heldout_every}: wanted 0, or at least 2 so that documents are left to train on.")
  if shard_bytes < 1 or (workers is not None and workers < 0):
    raise ValueError(f"shard_bytes={shard_bytes}, workers={workers}: wanted a positive number, and at least 0 or None.")
  if not (tokenizer.eos_ids or messages_key):  # the template ends conversations
    raise ValueError("The tokenizer has no end-of-text id to put between documents.")
  if bos and tokenizer.bos_id is None:
    raise ValueError("bos=True, but the tokenizer has no begin-of-text id.")
  arguments = {
    "input": input,
    "text_key": text_key,
    "sequence_length": sequence_length,
    "documents": documents,
    "bos": bos,
    "heldout_every": heldout_every,
    "vocab_size": vocab_size,
    "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
    "shard_bytes": shard_bytes,
  }
  if bos and messages_key:
    raise ValueError("bos=True: conversations begin as the chat template says; leave it out.")
  if messages_key:
    template = getattr(tokenizer, "template", None)
    if template is None:
      raise ValueError(
        f"messages_key={messages_key!r}: the tokenizer comes without a chat template (chat_template.jinja), which says "
        "how messages are put into a text. Put that of the chat model beside it, or pack text."
      )
    source = hashlib.sha256(template.source.encode()).hexdigest()
    arguments |= {"messages_key": messages_key, "chat_template_sha256": source}
  directory = absolute(output)
  for given in directories_of(input):
    if Path(given).absolute() in (directory, *directory.parents):
      raise ValueError(f"output={output} lies within the input {given}, and would be read as text: choose another.")
  if isinstance(directory, Path):
    return _pack(directory, tokenizer, arguments, skip_bad, workers)
  if occupied(directory):
    return _already_there(directory, arguments)
  name = hashlib.sha256(to_json([str(directory), arguments]).encode()).hexdigest()
  made_here = bucket.cache_directory() / f"packing-{name}"
  made = _pack(made_here, tokenizer, arguments, skip_bad, workers)
  _copy(made_here, directory)
  shutil.rmtree(made_here)
  return made


def _copy(directory: Path, target: AnyPath) -> None:
  """Copies packed text to a bucket: files of rows first, then each meta.json, SOURCE_FILE last."""

  def turn(path: Path) -> tuple[bool, bool, Path]:
    return path.name == SOURCE_FILE, path.name == META_FILE, path

  with new_directory(os.fspath(target)) as there:
    for path in sorted((path for path in directory.rglob("*") if path.is_file()), key=turn):
      bucket.upload(path, there / path.relative_to(directory))


def _pack(
  output: Path, tokenizer: TextEncoder, arguments: Mapping[str, Any], skip_bad: bool, workers: int | None
) -> Prepared:
  """Does what `prepare` does, for checked arguments and a local output."""
  partial = output.with_name(f"{output.name}.partial")
  if (output / UNFINISHED).exists():
    # The disk cannot rename directories, and an earlier job was killed while it moved the files one by one.
    move_files(partial, output, last=SOURCE_FILE)
  if occupied(output):
    return _already_there(output, arguments)

  key, messages = column_of(arguments)
  files = find_files(arguments["input"], messages=messages)
  with locked(partial):
    job = Job(partial, arguments, files)
    encode = Encoder(tokenizer, key, messages, arguments["bos"], arguments["vocab_size"], job.dtype, skip_bad)
    pieces = pieces_from(files, key, job.at, messages=messages)
    tokens = 0
    with packing_progress(sum(file.size for file in files), job.bytes_read) as progress:
      for (at, bytes_read), encoded in encode_in_order(pieces, encode, worker_count(workers, files)):
        job.take(encoded, at, bytes_read)
        tokens += len(encoded.ids)
        progress.advance_to(bytes_read, tokens=tokens, tokens_per_second=tokens / progress.elapsed)
    infos = job.finish()
    if output.exists():
      output.rmdir()
    rename_directory(partial, output, last=SOURCE_FILE)
  (output / JOURNAL_FILE).unlink(missing_ok=True)
  speed = tokens / progress.elapsed
  bad = job.bad["count"], tuple(job.bad["first"])
  return Prepared(infos["train"], infos.get("heldout"), speed, *bad, tuple(job.notes), len(files))


def _already_there(output: AnyPath, arguments: Mapping[str, Any]) -> Prepared:
  if not (output / SOURCE_FILE).is_file():
    raise FileExistsError(f"{output} holds something that is no packed text. Remove it or choose another output.")
  made = json.loads((output / SOURCE_FILE).read_text())
  differ = differences(made["arguments"], arguments)
  # Compares sizes only: the files may have been deleted, or copied and so changed their times.
  with contextlib.suppress(FileNotFoundError):
    found = find_files(arguments["input"], messages="messages_key" in arguments)
    now = {file.path: file.size for file in found}
    differ += differences({path: size for path, size, _ in made["files"]}, now)
  if differ:
    raise ValueError(
      f"{output} was packed from other text or with other arguments; remove it or choose another output. "
      f"{'; '.join(differ)}"
    )
  # An earlier job was killed after it renamed the directory and before it removed the journal.
  (output / JOURNAL_FILE).unlink(missing_ok=True)
  heldout = load_info(output / "heldout") if arguments["heldout_every"] else None
  bad = made.get("skipped", NOTHING_BAD)
  said = tuple(made.get("notes", ()))
  return Prepared(load_info(output / "train"), heldout, None, bad["count"], tuple(bad["first"]), said)
