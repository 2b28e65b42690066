"""A process whose disk is a mounted bucket's: `python -m tests.support.poor_disk MOVES WHAT=DIRECTORY ...`.

It has no locks, no fsync of directories, renames no directory that holds files, and says that it has 0 bytes in all.
After MOVES files that were moved into place one by one the process is killed; 0 is never.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from convert_weights import orbax_to_hf
from supra_jax.core.files import TEMPORARY
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.storage.run_states import RunStates


def _refuse(name: str, refuses, code: int, module=os) -> None:
  call = getattr(module, name)

  def refusing(*args, **kwargs):
    if refuses(*args):
      raise OSError(code, os.strerror(code))
    return call(*args, **kwargs)

  setattr(module, name, refusing)


def make_poor(moves: int) -> None:
  _refuse("fsync", lambda handle: os.path.isdir(f"/proc/self/fd/{handle}"), errno.EINVAL)
  _refuse("flock", lambda *_: True, errno.ENOTSUP, fcntl)
  no_bytes = type(shutil.disk_usage("/"))(0, 0, 0)
  shutil.disk_usage = lambda _: no_bytes
  # As gcsfuse has it.
  _refuse("rename", lambda path, _: os.path.isdir(path) and os.listdir(path), errno.EMFILE)
  replace, moved = os.replace, []

  def counted(path, target):
    replace(path, target)
    moved.extend([target] * (not str(path).endswith(TEMPORARY)))
    if len(moved) == moves > 0:
      os.kill(os.getpid(), signal.SIGKILL)

  os.replace = counted


def model(directory: Path) -> None:
  stored = load_model(directory / "model")
  save_model(
    directory / "out",
    config=stored.config,
    params=stored.params,
    tokenizer_files=stored.tokenizer_files,
    source=stored.source,
  )
  orbax_to_hf.convert(directory / "model", directory / "exported")


def rows(directory: Path) -> None:
  stored = load_model(directory / "model")
  tokenizer = Tokenizer.from_files(stored.tokenizer_files, stored.config)
  assert tokenizer is not None
  given = {"vocab_size": tiny.VOCAB, "sequence_length": 32, "heldout_every": 5, "workers": 0, "shard_bytes": 10_000}
  prepare(str(directory / "text.jsonl"), tokenizer, directory / "out", **given)


def states(directory: Path) -> None:
  def open_states():
    return RunStates(directory / "out" / "training", keep=2)

  state = {"a": jnp.arange(12.0).reshape(3, 4)}
  checkpoints = open_states()
  for step in (1, 2, 3):
    checkpoints.wait()
    checkpoints.save(step, {"a": state["a"] + step}, {"at": step})
  checkpoints.close()
  newest = directory / "out" / "training" / "3"
  (newest / "state" / "manifest.ocdbt").write_text("damaged")
  # As a kill before Orbax's last file leaves it.
  (directory / "out" / "training" / "4" / "state").mkdir(parents=True)
  like = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=state["a"].sharding)}
  checkpoints = open_states()
  found = checkpoints.restore(like)
  assert found is not None
  step, restored, position = found
  assert (step, position) == (2, {"at": 2}) and (restored["a"] == state["a"] + 2).all()
  checkpoints.close()
  assert [path.name for path in (directory / "out" / "training").iterdir()] == ["2"]


if __name__ == "__main__":
  make_poor(int(sys.argv[1]))
  for argument in sys.argv[2:]:
    what, _, directory = argument.partition("=")
    {"model": model, "rows": rows, "states": states}[what](Path(directory))
