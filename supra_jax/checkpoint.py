"""Checkpoints on disk: models, whole in one directory, and the states that a run can go on from.

DIR/config.json       the ModelConfig
DIR/params/           the parameters, an Orbax PyTree checkpoint, one subtree a layer
DIR/tokenizer.json    or tokenizer.model; absent where the source had none
DIR/source.json       where the model came from
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from supra_jax.config import ModelConfig

Params = Mapping[str, Any]

CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"
PARAMS_DIRECTORY = "params"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class ModelCheckpoint:
  """A model as it lies on disk.

  Attributes:
    config: what the model is.
    params: nested dict of jax arrays.
    tokenizer_files: file name -> contents, the subset of TOKENIZER_FILES that the directory holds.
    source: where the model came from (JSON object).
  """

  config: ModelConfig
  params: Params
  tokenizer_files: Mapping[str, bytes]
  source: Mapping[str, Any]


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields a temporary sibling of `path` that becomes `path` only if the block succeeds.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
  """
  final = Path(path).absolute()
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise FileExistsError(f"{path} already exists. Remove it or choose another output directory.")
  final.parent.mkdir(parents=True, exist_ok=True)
  partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    if final.exists():
      final.rmdir()
    os.rename(partial, final)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def save_model(
  directory: str | os.PathLike[str],
  *,
  config: ModelConfig,
  params: Params,
  tokenizer_files: Mapping[str, bytes],
  source: Mapping[str, Any],
) -> None:
  """Writes a model directory, whole or not at all.

  Args:
    directory: must not exist yet, or be empty.
    config: what the model is.
    params: nested dict of jax or numpy arrays, one subtree a layer.
    tokenizer_files: file name -> contents; may be empty.
    source: a JSON object that says where the model came from.

  Raises:
    FileExistsError: the directory holds something already.
  """
  unknown = sorted(set(tokenizer_files) - set(TOKENIZER_FILES))
  if unknown:
    raise ValueError(f"Tokenizer files {unknown}: wanted a subset of {list(TOKENIZER_FILES)}.")
  with new_directory(directory) as partial:
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(partial / PARAMS_DIRECTORY, params)
    (partial / CONFIG_FILE).write_text(config.to_json())
    (partial / SOURCE_FILE).write_text(json.dumps(dict(source), indent=2) + "\n")
    for name, contents in tokenizer_files.items():
      (partial / name).write_bytes(contents)


def load_model(directory: str | os.PathLike[str], dtype: Any = None) -> ModelCheckpoint:
  """Reads a model directory.

  Args:
    directory: what `save_model` wrote.
    dtype: floating-point parameters are converted to it on load; None keeps what is stored.

  Raises:
    FileNotFoundError: the directory is no model checkpoint, or a part of it is missing.
    ValueError: its config.json does not describe a model.
  """
  path = Path(directory).absolute()
  for name in (CONFIG_FILE, PARAMS_DIRECTORY):
    if not (path / name).exists():
      raise FileNotFoundError(
        f"{directory} is not a supra_jax model: {name} is missing. Convert one with "
        "`python -m convert_weights.hf_to_orbax --source=... --output=...`."
      )
  try:
    config = ModelConfig.from_json((path / CONFIG_FILE).read_text())
  except ValueError as error:
    raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
  source = json.loads((path / SOURCE_FILE).read_text()) if (path / SOURCE_FILE).exists() else {}
  tokenizer_files = {n: (path / n).read_bytes() for n in TOKENIZER_FILES if (path / n).exists()}
  return ModelCheckpoint(config, _restore(path / PARAMS_DIRECTORY, dtype), tokenizer_files, source)


class TrainingCheckpoints:
  """What a run needs to go on: the train state and the position in the data, a directory a step.

  Attributes:
    directory: of the run's checkpoints.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: grain.DatasetIterator) -> None:
    """Starts to write; the arrays may be donated as soon as it returns."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
    self._manager.save(step, args=args)

  def restore(self, step: int, like: Any, data: grain.DatasetIterator) -> Any:
    """Returns the state of a step and moves `data` to where it was.

    Args:
      step: one that was saved.
      like: jax.ShapeDtypeStruct, with shardings, of every array of the state.
      data: an iterator over the same dataset.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=grain.checkpoint.CheckpointRestore(data))
    return self._manager.restore(step, args=args)["state"]

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _restore(path: Path, dtype: Any) -> Params:
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree

    def restore_args(leaf):
      wanted = np.dtype(leaf.dtype)
      if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
        wanted = np.dtype(dtype)
      return ocp.ArrayRestoreArgs(sharding=sharding, dtype=wanted)

    return checkpointer.restore(path, restore_args=jax.tree.map(restore_args, metadata))
