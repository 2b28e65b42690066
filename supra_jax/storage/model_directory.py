"""Models on disk, each whole in one directory.

DIR/config.json       the ModelConfig
DIR/params/           the parameters, an Orbax PyTree checkpoint with one subtree per layer
DIR/tokenizer.json    or tokenizer.model, with tokenizer_config.json; absent if the source has none
DIR/chat_template.jinja, DIR/generation_config.json   unchanged from the source; absent if it has none
DIR/source.json       where the model came from
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from supra_jax.core.distributed import together
from supra_jax.core.files import AnyPath, absolute, new_directory, temporary_directory
from supra_jax.core.plain_json import to_json
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import parameter_name
from supra_jax.storage.disk import check_space
from supra_jax.storage.parameters import Params, checked_shapes, read_params, write_params

CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"
PARAMS_DIRECTORY = "params"
_SMALL_BYTES = 2**16
TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelCheckpoint:
  """Contents of a model directory.

  Attributes:
    config: the model's config.
    params: nested dict of jax arrays, one subtree per layer; empty after `load_model_without_params`.
    tokenizer_files: file name -> contents of those TOKENIZER_FILES that the directory holds: tokenizer, chat template
      and generation settings.
    source: where the model came from, a JSON object.
  """

  config: ModelConfig
  params: Params
  tokenizer_files: Mapping[str, bytes]
  source: Mapping[str, Any]


@contextlib.contextmanager
def _new_shared_directory(path: str | os.PathLike[str]) -> Iterator[AnyPath]:
  """Yields to all processes what `new_directory` yields; process 0 makes and renames the directory, the others wait."""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(new_directory(path, last=CONFIG_FILE))
    together("directory made")
    yield temporary_directory(path)
    together("directory written")
  together("directory renamed")


def save_model(
  directory: str | os.PathLike[str],
  *,
  config: ModelConfig,
  params: Params,
  tokenizer_files: Mapping[str, bytes],
  source: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
  """Writes a model directory atomically. All processes call `save_model` together; each writes its own shards.

  Args:
    directory: directory to make, local or gs://; must be empty if it exists.
    config: the model's config.
    params: nested dict of jax arrays, numpy arrays or `UnreadArray`s, one subtree per layer.
    tokenizer_files: name -> contents, for any of TOKENIZER_FILES.
    source: a JSON object that says where the model came from, or a function that returns it and is called after the
      parameters are written.

  Raises:
    FileExistsError: the directory is not empty.
    OSError: the directory could not be written.
    ValueError: a name in `tokenizer_files` is unknown, another process is making the same directory, `directory` is a
      path that `core.files.place` rejects, or the parameters are those of `LM.params`, for inference alone.
  """
  unknown = sorted(set(tokenizer_files) - set(TOKENIZER_FILES))
  if unknown:
    raise ValueError(f"Tokenizer files {unknown}: wanted a subset of {list(TOKENIZER_FILES)}.")
  _check_complete(params)
  with _new_shared_directory(directory) as temporary:
    check_space(temporary.parent, params)
    write_params(temporary / PARAMS_DIRECTORY, params)
    if jax.process_index() == 0:
      for name, contents in tokenizer_files.items():
        (temporary / name).write_bytes(contents)
      (temporary / SOURCE_FILE).write_text(to_json(dict(source() if callable(source) else source), indent=2) + "\n")
      # Written last, since readers reject a directory without it: in a bucket nothing else marks a partial one.
      (temporary / CONFIG_FILE).write_text(config.to_json())


def _check_complete(params: Params) -> None:
  names = {parameter_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
  biases = {name for name in names if re.search(r"feature_map\w*/bias$", name)}
  if {f"{name.removesuffix('bias')}kernel" for name in biases} - names:
    raise ValueError("These parameters are for inference alone, as `LM.params` are: `load_model` returns those stored.")


def load_model(
  directory: str | os.PathLike[str], dtype: Any = None, *, shardings: Callable[[Params], Params] | None = None
) -> ModelCheckpoint:
  """Loads a model from a model directory.

  Args:
    directory: a directory that `save_model` wrote, local or gs://.
    dtype: dtype that floating-point parameters are converted to; None keeps the stored dtypes.
    shardings: maps the tree of parameter shapes to a tree of shardings; each device then reads its own shards only.
      None puts all parameters on the first local device.

  Raises:
    FileNotFoundError: `directory` is not a model directory: config.json or params/ is missing.
    ValueError: config.json does not describe a model, source.json is not JSON, the stored parameters are not those of
      the model that config.json describes, or `directory` is a path that `core.files.place` rejects.
  """
  model = _read_files(directory)
  params = read_params(absolute(directory) / PARAMS_DIRECTORY, model.config, dtype, shardings)
  return dataclasses.replace(model, params=params)


def load_model_without_params(directory: str | os.PathLike[str]) -> ModelCheckpoint:
  """Loads all of a model directory but the values of the parameters: `params` of the result is an empty dict.

  Raises:
    FileNotFoundError, ValueError: as `load_model`; names and shapes of the stored parameters are checked too.
  """
  model = _read_files(directory)
  with ocp.PyTreeCheckpointer() as checkpointer:
    checked_shapes(checkpointer, absolute(directory) / PARAMS_DIRECTORY, model.config)
  return model


def fingerprint(directory: str | os.PathLike[str]) -> str:
  """Returns a hash that tells a model directory from any other, whatever its path, without reading the parameters.

  It is of config.json, and of names, sizes and, if they are small, contents of the files in params/; Orbax draws the
  names at random for each save.

  Raises:
    FileNotFoundError: `directory` is not a model directory.
  """
  path = absolute(directory)
  digest = hashlib.sha256((path / CONFIG_FILE).read_bytes())
  for file in sorted(x for x in (path / PARAMS_DIRECTORY).rglob("*") if not x.is_dir()):
    size = file.stat().st_size if isinstance(file, Path) else file.stat().length
    digest.update(f"{file.relative_to(path / PARAMS_DIRECTORY)} {size}".encode())
    if size <= _SMALL_BYTES:
      digest.update(file.read_bytes())
  return digest.hexdigest()[:32]


def _read_files(directory: str | os.PathLike[str]) -> ModelCheckpoint:
  path = absolute(directory)
  for name in (CONFIG_FILE, PARAMS_DIRECTORY):
    if not (path / name).exists():
      missing = f"{name} is missing" if path.exists() else "there is no such directory"
      raise FileNotFoundError(
        f"{directory} is not a supra_jax model: {missing}. Convert one with "
        "`python -m convert_weights.hf_to_orbax --source=... --output=...`."
      )
  try:
    config = ModelConfig.from_json((path / CONFIG_FILE).read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path / CONFIG_FILE}: not JSON, or a damaged file: {error}") from error
  except ValueError as error:
    raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
  try:
    source = json.loads((path / SOURCE_FILE).read_text()) if (path / SOURCE_FILE).exists() else {}
  except ValueError as error:
    raise ValueError(f"{path / SOURCE_FILE}: not JSON, or a damaged file: {error}") from error
  if not isinstance(source, dict):
    raise ValueError(f"{path / SOURCE_FILE}: wanted a JSON object, got {str(source)[:40]}")
  tokenizer_files = {n: (path / n).read_bytes() for n in TOKENIZER_FILES if (path / n).exists()}
  return ModelCheckpoint(config, {}, tokenizer_files, source)
