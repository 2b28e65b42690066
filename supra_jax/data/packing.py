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
import datetime
import hashlib
import itertools
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from supra_jax.core import bucket
from supra_jax.core.files import (
  TEMPORARY,
  UNFINISHED,
  AnyPath,
  absolute,
  into_place,
  locked,
  move_files,
  new_directory,
  occupied,
  rename_directory,
)
from supra_jax.core.plain_json import to_json
from supra_jax.data.encoding import (
  Encoded,
  Encoder,
  Place,
  digest_of,
  encode_in_order,
  packing_progress,
  pieces_from,
  worker_count,
)
from supra_jax.data.packed import (
  META_FILE,
  Documents,
  Dtype,
  PackedInfo,
  RowsWriter,
  Shard,
  TextEncoder,
  load_info,
  tokenizer_fingerprint,
)
from supra_jax.data.text import InputFile, find_files, read_pieces

Part = Literal["train", "heldout"]

SOURCE_FILE, JOURNAL_FILE = "source.json", "journal.npz"
SHARD_BYTES = 2**26
BAD_NAMED = 5
NOTHING_BAD: Mapping[str, Any] = {"count": 0, "first": []}
_OURS = {"train", "heldout", SOURCE_FILE, JOURNAL_FILE}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Result of `prepare`.

  Attributes:
    train: description of OUTPUT/train.
    heldout: description of OUTPUT/heldout; None if nothing is held out.
    tokens_per_second: speed of packing; None if the output was finished before the call.
    bad: number of lines and rows that were skipped because they hold no text.
    bad_first: error messages of the first few skipped lines and rows.
  """

  train: PackedInfo
  heldout: PackedInfo | None
  tokens_per_second: float | None
  bad: int = 0
  bad_first: tuple[str, ...] = ()


def prepare(
  input: str,
  tokenizer: TextEncoder,
  output: str | os.PathLike[str],
  *,
  vocab_size: int,
  sequence_length: int,
  text_key: str = "text",
  documents: Documents = "join",
  bos: bool = False,
  heldout_every: int = 0,
  skip_bad: bool = False,
  workers: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> Prepared:
  """Packs text into rows of sequence_length + 1 tokens; resumes a call that was killed, and keeps finished output.

  Each document is followed by the first of the tokenizer's end-of-text ids; documents without a token are skipped. The
  last token of a row is also the first of the next row, so that every token of OUTPUT/train (and of OUTPUT/heldout) but
  the very first is the token to predict exactly once. The bytes written depend only on the text, the tokenizer and the
  arguments except `workers`.

  Worker processes are spawned: with workers, a script that calls `prepare` has to be guarded by
  `if __name__ == "__main__":`.

  Args:
    input: glob of files, or `pydoc:topics`, as `text.find_files` takes it.
    tokenizer: encodes the documents; pickled for the workers.
    output: the directory to make, local or gs://.
    vocab_size: number of rows of the model's embedding; ids have to be below this number.
    sequence_length: T, number of tokens to predict per row.
    text_key: the key of JSON lines, or the column of parquet files, that holds the text.
    documents: how documents share a row; `separate` also stores the number of each token's document in the row, from 1.
    bos: whether each document starts with the begin-of-text id.
    heldout_every: N; every N-th document goes to OUTPUT/heldout. 0: none does.
    skip_bad: whether lines and rows that hold no text are skipped and counted; False raises ValueError at the first.
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
  if sequence_length < 1 or documents not in ("join", "separate"):
    raise ValueError(
      f"sequence_length={sequence_length}, documents={documents!r}: wanted a positive number, 'join' or 'separate'."
    )
  if heldout_every < 0 or heldout_every == 1:
    raise ValueError(f"heldout_every={heldout_every}: wanted 0, or at least 2 so that documents are left to train on.")
  if shard_bytes < 1 or (workers is not None and workers < 0):
    raise ValueError(f"shard_bytes={shard_bytes}, workers={workers}: wanted a positive number, and at least 0 or None.")
  if not tokenizer.eos_ids:
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
  directory = absolute(output)
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

  input, text_key = arguments["input"], arguments["text_key"]
  files = find_files(input)
  with locked(partial):
    job = _Job(partial, arguments, files)
    encode = Encoder(tokenizer, text_key, arguments["bos"], arguments["vocab_size"], job.dtype, skip_bad)
    pieces = pieces_from(files, text_key, job.at)
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
  return Prepared(infos["train"], infos.get("heldout"), speed, job.bad["count"], tuple(job.bad["first"]))


def _already_there(output: AnyPath, arguments: Mapping[str, Any]) -> Prepared:
  if not (output / SOURCE_FILE).is_file():
    raise FileExistsError(f"{output} holds something that is no packed text. Remove it or choose another output.")
  made = json.loads((output / SOURCE_FILE).read_text())
  differ = _differences(made["arguments"], arguments)
  # Compares sizes only: the files may have been deleted, or copied and so changed their times.
  with contextlib.suppress(FileNotFoundError):
    now = {file.path: file.size for file in find_files(arguments["input"])}
    differ += _differences({path: size for path, size, _ in made["files"]}, now)
  if differ:
    raise ValueError(
      f"{output} was packed from other text or with other arguments; remove it or choose another output. "
      f"{'; '.join(differ)}"
    )
  # An earlier job was killed after it renamed the directory and before it removed the journal.
  (output / JOURNAL_FILE).unlink(missing_ok=True)
  heldout = load_info(output / "heldout") if arguments["heldout_every"] else None
  bad = made.get("skipped", NOTHING_BAD)
  return Prepared(load_info(output / "train"), heldout, None, bad["count"], tuple(bad["first"]))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
  said = [f"{name}: {before.get(name, 'absent')} before, {now.get(name, 'absent')} now" for name in names]
  return said[:10] + ([f"and {len(said) - 10} more"] if said[10:] else [])


class _Job:
  """An output while it is being packed, new or resumed from its journal.

  Attributes:
    dtype: numpy dtype of the stored integers.
    at: position in the input up to which documents were taken.
    bytes_read: bytes of the input up to `at`.
    bad: number of items skipped so far (`count`), and error messages of the first skipped items (`first`).
  """

  def __init__(self, partial: Path, arguments: Mapping[str, Any], files: list[InputFile]):
    self._partial, self._arguments = partial, arguments
    self._files = [dataclasses.astuple(file) for file in files]
    self.at: Place = (0, 0, "")
    self.bad: Mapping[str, Any] = NOTHING_BAD
    self.bytes_read = self._documents = 0
    largest = max(arguments["vocab_size"] - 1, arguments["sequence_length"] + 1)
    self.dtype: Dtype = "<u2" if largest < 2**16 else "<i4"
    names: tuple[Part, ...] = ("train", "heldout") if arguments["heldout_every"] else ("train",)
    self._parts = {
      name: RowsWriter(
        partial / name,
        sequence_length=arguments["sequence_length"],
        documents=arguments["documents"],
        dtype=self.dtype,
        shard_bytes=arguments["shard_bytes"],
      )
      for name in names
    }
    journal = partial / JOURNAL_FILE
    if not (journal.exists() and self._resume(journal)):
      paths = list(partial.iterdir())
      strangers = sorted({path.name.removesuffix(TEMPORARY) for path in paths} - _OURS)
      if strangers:
        raise ValueError(f"{partial} holds {', '.join(strangers)}, which this program did not write; remove it.")
      # Without a journal no file of rows is complete, so nothing is lost; the arguments may have changed since.
      for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names:
      (partial / name).mkdir(exist_ok=True)

  def take(self, encoded: Encoded, at: Place, bytes_read: int) -> None:
    """Adds the documents of a piece to train and heldout; if files of rows are now full, writes them and the journal.

    Args:
      encoded: the documents of the piece.
      at: position in the input after the piece.
      bytes_read: bytes of the input up to `at`.
    """
    numbers = self._documents + 1 + np.arange(len(encoded.lengths))
    every = self._arguments["heldout_every"]
    heldout = numbers % every == 0 if every else np.zeros(len(numbers), bool)
    self.at, self.bytes_read, self._documents = at, bytes_read, self._documents + len(numbers)
    first = [*self.bad["first"], *encoded.bad][:BAD_NAMED]
    self.bad = {"count": self.bad["count"] + len(encoded.bad), "first": first}
    for name, part in self._parts.items():
      chosen = heldout if name == "heldout" else ~heldout
      part.add(encoded.ids[np.repeat(chosen, encoded.lengths)], encoded.lengths[chosen])
    written = [part.write_full() for part in self._parts.values()]
    if any(written):
      self._save()

  def finish(self) -> dict[Part, PackedInfo]:
    """Writes the remaining rows, each part's meta.json, and SOURCE_FILE; returns the contents of each meta.json."""
    arguments = self._arguments
    for name, part in self._parts.items():
      try:
        part.finish(
          bos=arguments["bos"], vocab_size=arguments["vocab_size"], tokenizer_sha256=arguments["tokenizer_sha256"]
        )
      except ValueError as error:
        # Removed, since this text and these arguments fail each time: there is nothing to resume.
        shutil.rmtree(self._partial)
        raise ValueError(
          f"The {name} part of {arguments['input']}, heldout_every={arguments['heldout_every']}: {error}"
        ) from error
    with into_place(self._partial / SOURCE_FILE) as temporary:
      temporary.write_text(
        to_json({"arguments": arguments, "files": self._files, "skipped": self.bad}, indent=2) + "\n"
      )
    return {name: load_info(self._partial / name) for name in self._parts}

  def _save(self) -> None:
    state = {
      "arguments": self._arguments,
      "files": self._files,
      "at": self.at,
      "bytes_read": self.bytes_read,
      "documents": self._documents,
      "skipped": self.bad,
    }
    arrays = {}
    for name, part in self._parts.items():
      state[name] = {"documents": part.documents, "shards": [dataclasses.asdict(shard) for shard in part.shards]}
      arrays[f"{name}_ids"], arrays[f"{name}_starts"] = part.pending
    arrays["state"] = np.array(to_json(state))
    with into_place(self._partial / JOURNAL_FILE) as temporary, open(temporary, "wb") as file:
      np.savez(file, allow_pickle=False, **arrays)

  def _resume(self, journal: Path) -> bool:
    """Restores what the journal holds; if the text that was already packed has changed, prints so and returns False."""
    try:
      with np.load(journal) as saved:
        arrays = {name: saved[name] for name in saved.files}
      state = json.loads(str(arrays["state"]))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
      raise ValueError(f"{journal} cannot be read: {error}. Remove {self._partial} to start over.") from error
    differ = _differences(state["arguments"], self._arguments)
    if differ:
      raise ValueError(
        f"{self._partial} is half-finished and was begun with other arguments; remove it to start over. "
        f"{'; '.join(differ)}"
      )
    number, done, digest = (*state["at"], "")[:3]  # older journals have no digest
    changed = _differences(_described(state["files"]), _described(self._files))
    if changed and not self._begins_alike(state["files"], (number, done, digest)):
      print(f"The input has changed, packing starts over: {'; '.join(changed)}", file=sys.stderr, flush=True)
      return False
    self.at, self.bytes_read, self._documents = (number, done, digest), state["bytes_read"], state["documents"]
    self.bad = state.get("skipped", NOTHING_BAD)
    for name, part in self._parts.items():
      shards = [Shard(**shard) for shard in state[name]["shards"]]
      part.restore(state[name]["documents"], shards, arrays[f"{name}_ids"], arrays[f"{name}_starts"])
    return True

  def _begins_alike(self, files: Sequence[Sequence[Any]], at: Place) -> bool:
    """Whether the input up to the position `at` is the same as before; text after that position may have changed.

    Args:
      files: (path, size, time of change) of each input file when the journal was written.
      at: position in the input when the journal was written.
    """
    number, done, digest = at
    if [tuple(file) for file in files[:number]] != self._files[:number]:
      return False
    path = files[number][0]
    if path not in [file[0] for file in self._files[number : number + 1]]:
      return False
    items = itertools.chain.from_iterable(piece.items for piece in read_pieces(path, self._arguments["text_key"]))
    return digest_of(itertools.islice(items, done)) == digest


def _described(files: Iterable[Sequence[Any]]) -> dict[str, str]:
  described = {}
  for path, size, changed in files:
    date = datetime.datetime.fromtimestamp(changed // 10**9)
    described[path] = f"{size} bytes of {date}.{changed % 10**9:09}"
  return described
