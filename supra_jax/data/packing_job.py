"""An output of `packing.prepare` while it is being packed: what is kept for a later call, and how that goes on."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from supra_jax.core.files import TEMPORARY, into_place
from supra_jax.core.plain_json import to_json
from supra_jax.data.encoding import Encoded, Place, digest_of
from supra_jax.data.packed import Dtype, PackedInfo, Shard, load_info
from supra_jax.data.rows_writer import Pending, RowsWriter
from supra_jax.data.text import InputFile, read_pieces

Part = Literal["train", "heldout"]

SOURCE_FILE, JOURNAL_FILE = "source.json", "journal.npz"
BAD_NAMED = 5
NOTHING_BAD: Mapping[str, Any] = {"count": 0, "first": []}
_OURS = {"train", "heldout", SOURCE_FILE, JOURNAL_FILE}


class Job:
  """An output while it is being packed, new or resumed from its journal.

  Attributes:
    dtype: numpy dtype of the stored integers.
    at: position in the input up to which documents were taken.
    bytes_read: bytes of the input up to `at`.
    bad: number of items skipped so far (`count`), and error messages of the first skipped items (`first`).
    notes: what a user should know of the documents so far.
  """

  def __init__(self, partial: Path, arguments: Mapping[str, Any], files: list[InputFile]):
    self._partial, self._arguments = partial, arguments
    self._files = [dataclasses.astuple(file) for file in files]
    self.at: Place = (0, 0, "")
    self.bad: Mapping[str, Any] = NOTHING_BAD
    self.notes: list[str] = []
    self.bytes_read = self._documents = 0
    largest = max(arguments["vocab_size"] - 1, arguments["sequence_length"] + 1)
    self.dtype: Dtype = "<u2" if largest < 2**16 else "<i4"
    names: tuple[Part, ...] = ("train", "heldout") if arguments["heldout_every"] else ("train",)
    self._parts = {
      name: RowsWriter(
        partial / name,
        sequence_length=arguments["sequence_length"],
        documents=arguments["documents"],
        masked="messages_key" in arguments,
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
    self.notes = list(dict.fromkeys([*self.notes, *encoded.notes]))
    for name, part in self._parts.items():
      chosen = heldout if name == "heldout" else ~heldout
      tokens = np.repeat(chosen, encoded.lengths)
      part.add(encoded.ids[tokens], encoded.learned[tokens], encoded.lengths[chosen])
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
        to_json({"arguments": arguments, "files": self._files, "skipped": self.bad, "notes": self.notes}, indent=2)
        + "\n"
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
      "notes": self.notes,
    }
    arrays: dict[str, np.ndarray] = {}
    for name, part in self._parts.items():
      shards = [dataclasses.asdict(shard) for shard in part.shards]
      counts = {"documents": part.documents, "learned": part.learned, "passed_over": part.passed_over}
      state[name] = {"shards": shards, **counts}
      arrays |= {f"{name}_{field}": array for field, array in part.pending._asdict().items()}
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
    differ = differences(state["arguments"], self._arguments)
    if differ:
      raise ValueError(
        f"{self._partial} is half-finished and was begun with other arguments; remove it to start over. "
        f"{'; '.join(differ)}"
      )
    number, done, digest = (*state["at"], "")[:3]  # older journals have no digest
    changed = differences(_described(state["files"]), _described(self._files))
    if changed and not self._begins_alike(state["files"], (number, done, digest)):
      print(f"The input has changed, packing starts over: {'; '.join(changed)}", file=sys.stderr, flush=True)
      return False
    self.at, self.bytes_read, self._documents = (number, done, digest), state["bytes_read"], state["documents"]
    self.bad, self.notes = state.get("skipped", NOTHING_BAD), state.get("notes", [])
    for name, part in self._parts.items():
      shards = [Shard(**shard) for shard in state[name]["shards"]]
      ids, starts = arrays[f"{name}_ids"], arrays[f"{name}_starts"]
      # Older journals, of text, do not say what is learned: all.
      pending = Pending(ids, starts, arrays.get(f"{name}_learned", np.ones(len(ids), bool)))
      counts = {count: state[name].get(count, 0) for count in ("documents", "learned", "passed_over")}
      part.restore(shards, pending, **counts)
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
    key, messages = column_of(self._arguments)
    items = itertools.chain.from_iterable(piece.items for piece in read_pieces(path, key, messages=messages))
    return digest_of(itertools.islice(items, done)) == digest


def _described(files: Iterable[Sequence[Any]]) -> dict[str, str]:
  described = {}
  for path, size, changed in files:
    date = datetime.datetime.fromtimestamp(changed // 10**9)
    described[path] = f"{size} bytes of {date}.{changed % 10**9:09}"
  return described


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns a line for each of the names under which two mappings differ, ten at most."""
  names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
  said = [f"{name}: {before.get(name, 'absent')} before, {now.get(name, 'absent')} now" for name in names]
  return said[:10] + ([f"and {len(said) - 10} more"] if said[10:] else [])


def column_of(arguments: Mapping[str, Any]) -> tuple[str, bool]:
  """Returns (key or column of a document, whether it holds messages)."""
  return arguments.get("messages_key") or arguments["text_key"], "messages_key" in arguments
