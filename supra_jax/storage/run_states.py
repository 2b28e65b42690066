"""Saves the states of a run, and restores the newest undamaged one, from which the run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from supra_jax.core import bucket
from supra_jax.core.files import AnyPath, absolute, remove_directory, rename_directory, renames_directories, sync_below
from supra_jax.core.plain_json import to_json
from supra_jax.storage.disk import COMMIT_FILE, IN_PLACE, adapt_to_disk, check_space, first_line

MANIFEST_FILE = "digests.json"
UNSIGNED_FILES = (MANIFEST_FILE, "_CHECKPOINT_METADATA")  # have no digest in the manifest


class RunStates:
  """The saved states of a run: train state and position in the data, one directory for each saved step.

  Each directory has a manifest with the sha256 of its files, or in a bucket with the bucket's own checksums. Orbax
  stores no checksum of arrays, so that without the manifest a flipped bit would go unnoticed. The manifest is written
  before the directory gets its final name; where directories cannot be renamed, before Orbax writes COMMIT_FILE.

  Attributes:
    directory: the directory that holds one directory for each saved step.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    """Makes the directory, and removes from it what unfinished saves left.

    Args:
      directory: directory of the states, local or gs://.
      keep: number of newest states to keep; older states are removed.
    """
    self.directory = absolute(directory)
    self._in_place = _agreed(lambda: not isinstance(self.directory, Path) or not renames_directories(self.directory))
    adapt_to_disk(self.directory)
    asynchronous = ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      cleanup_tmp_directories=True,
      async_options=asynchronous,
      atomicity_options=IN_PLACE if self._in_place else None,
    )
    self._errors: list[Exception] = []
    names = {"state": _watched_handler(self._errors), "position": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=names)
    self._saving = -1

  def latest_step(self) -> int | None:
    """Returns the newest step that was saved, damaged or not; None if no step was saved."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
    """Starts to write a state in the background. Call `wait` before the next `save`.

    Args:
      step: number of steps trained; name of the state's directory.
      state: pytree of jax arrays; the arrays may be donated as soon as `save` returns.
      position: state of the data loader, a JSON object.

    Raises:
      OSError: writing could not be started; older states are unchanged. Later errors are raised by `wait`.
    """
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position)))
    self._saving = step
    with self._as_os_error():
      if jax.process_index() == 0:
        # After a failed save, its threads may have written files again once they were removed.
        self._remove_partial()
      check_space(self.directory, state)
      self._manager.save(step, args=args)

  def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Returns (step, state, position) of the newest undamaged state; None if no state was saved yet.

    Newer states that are damaged are reported on stderr and moved to the directory `damaged` beside `directory`.

    Args:
      like: the state's pytree, where every array is replaced by a `jax.ShapeDtypeStruct` with a sharding.

    Raises:
      ValueError: all saved states are damaged; none is moved.
    """
    step = self._newest_whole_step()
    if step is None:
      return None
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    return step, restored["state"], restored["position"]

  def wait(self) -> None:
    """Waits until the state of the last `save` is written.

    Raises:
      OSError: the state could not be written.
    """
    with self._as_os_error():
      # If one of several processes fails, Orbax makes all of them wait for each other for 600 seconds: look for errors
      # instead of waiting in Orbax.
      while jax.process_count() > 1 and self._manager.is_saving_in_progress():
        if self._errors:
          raise self._errors[0]
        time.sleep(0.01)
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until the state of the last `save` is written, and ends Orbax's threads.

    Raises:
      OSError: the state could not be written.
    """
    self.wait()
    self._manager.close()

  @contextlib.contextmanager
  def _as_os_error(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      # A full disk raises OSError, tensorstore's ValueError or an error of Orbax. With several processes the others may
      # still be writing: there the run ends, and the next start removes the partial state.
      if jax.process_count() == 1:
        # The partial state would only fill the disk further.
        self._remove_partial()
        # The manager has already dropped from its list the old states that the failed one was to replace.
        self._manager.reload()
      where = self.directory / str(self._saving)
      raise OSError(f"checkpoint {where} could not be written: {first_line(error)}") from error

  def _remove_partial(self) -> None:
    for partial in self._partial("*"):
      remove_directory(partial)

  def _partial(self, step: str) -> list[AnyPath]:
    """Returns the unfinished directories of a step; `step` is the number of the step, or "*" for all steps."""
    if not self._in_place:
      return list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))
    found = [path for path in self.directory.glob(step) if path.name.isdigit()]
    return [path for path in found if not (path / COMMIT_FILE).exists()]

  def _write_manifest(self) -> None:
    # Orbax calls this after all files of a step are written and before the directory is renamed or committed.
    if jax.process_index() == 0:
      (partial,) = self._partial(str(self._saving))
      (partial / MANIFEST_FILE).write_text(to_json(_digests(partial), indent=0) + "\n")
      if isinstance(partial, Path):
        sync_below(partial)

  def _newest_whole_step(self) -> int | None:
    # -1: nothing was saved yet. -2: all are damaged; broadcast, so that all processes raise the error.
    chosen, damaged = -1, {}
    if jax.process_index() == 0:
      for step in sorted(self._manager.all_steps(), reverse=True):
        damaged[step] = _damage(self.directory / str(step))
        if not damaged[step]:
          chosen = step
          del damaged[step]
          break
      else:
        chosen = -2 if damaged else -1
      self._report(damaged, move=chosen >= 0)
    if jax.process_count() > 1:
      chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    if chosen == -2:
      raise ValueError(
        f"No checkpoint in {self.directory} is whole, so the run cannot go on. Remove that directory to start over."
      )
    self._manager.reload()
    return None if chosen < 0 else chosen

  def _report(self, damaged: Mapping[int, str], *, move: bool) -> None:
    for step, damage in damaged.items():
      path = self.directory / str(step)
      said = f"Checkpoint {path} is damaged: {damage}."
      if move:
        aside = self.directory.with_name("damaged") / f"{step}-{os.getpid()}"
        if isinstance(path, Path):
          aside.parent.mkdir(exist_ok=True)
          rename_directory(path, aside, last=MANIFEST_FILE)
        else:
          bucket.move(path, aside)
        said += f" It was moved to {aside}."
      print(said, file=sys.stderr)


def _agreed(ask: Callable[[], bool]) -> bool:
  """Returns to all processes what `ask()` returns in process 0."""
  found = jax.process_index() == 0 and ask()
  return bool(multihost_utils.broadcast_one_to_all(np.int32(found))) if jax.process_count() > 1 else found


def _watched_handler(errors: list[Exception]) -> ocp.StandardCheckpointHandler:
  """Returns a StandardCheckpointHandler that appends each error of its background writes to `errors`."""
  handler = ocp.StandardCheckpointHandler()
  save = handler.async_save

  async def async_save(*args, **kwargs) -> Any:
    return [_Watched(future, errors) for future in await save(*args, **kwargs) or ()]

  # Patched, not subclassed: Orbax looks handlers up by their exact class.
  handler.async_save = async_save  # type: ignore[method-assign]
  return handler


class _Watched:
  def __init__(self, future: Any, errors: list[Exception]):
    self._future, self._errors = future, errors

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._future.result(timeout=timeout)
    except Exception as error:
      self._errors.append(error)
      raise


def _digests(directory: AnyPath) -> dict[str, str]:
  """Returns {path relative to `directory`: digest} of all files below a directory but UNSIGNED_FILES."""
  if not isinstance(directory, Path):
    found = bucket.checksums(directory)
    return {name: digest for name, digest in found.items() if name.rpartition("/")[2] not in UNSIGNED_FILES}

  def digest(path: Path) -> str:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in UNSIGNED_FILES)
  with ThreadPoolExecutor() as pool:
    return dict(zip((str(path.relative_to(directory)) for path in paths), pool.map(digest, paths), strict=True))


def _damage(directory: AnyPath) -> str:
  """Returns what is wrong with a saved state, naming the damaged file; an empty string if the state is undamaged."""
  try:
    wanted = json.loads((directory / MANIFEST_FILE).read_text())
  except (OSError, ValueError) as error:
    return f"{MANIFEST_FILE} cannot be read ({first_line(error)})"
  found = _digests(directory)
  for name, digest in wanted.items():
    if name not in found:
      return f"{name} is missing"
    if found[name] != digest:
      return f"{name} is not what was written"
  return ""
