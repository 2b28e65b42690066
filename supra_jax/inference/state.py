"""What a model remembers of a text, as a thing of its own: it is kept, forked, saved to a file and loaded again."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supra_jax.core.files import TEMPORARY, into_place, local
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import placed
from supra_jax.model.transformer import DecodeState, Transformer

FORMAT = "supra_jax state 1"
_COUNTERS = ("cached", "position", "segment")


@dataclasses.dataclass(frozen=True, repr=False)
class State:
  """What a model remembers of the texts that it has read: one row a text.

  Nothing that is done with a state changes it. Other models refuse it.

  Attributes:
    decode: the state of the model.
    hidden: activations [rows, D] after each row's last token, from which the next token is drawn.
    tokens: the token ids that each row has read.
    config: config of the model.
    checkpoint: fingerprint of the model's directory (`storage.model_directory.fingerprint`); None if it has none.
  """

  decode: DecodeState
  hidden: jax.Array
  tokens: tuple[np.ndarray, ...]
  config: ModelConfig
  checkpoint: str | None = None

  def __repr__(self) -> str:
    """Returns what the state is of, without its arrays."""
    return f"State(tokens read: {[ids.size for ids in self.tokens]}, {self.size_bytes:,} bytes)"

  @property
  def rows(self) -> int:
    """Number of texts."""
    return len(self.tokens)

  @property
  def size_bytes(self) -> int:
    """Bytes of all arrays that the model remembers, as they are in memory; not of the tokens' ids."""
    return sum(x.nbytes for x in jax.tree.leaves((self.decode, self.hidden)))

  def take(self, rows: Sequence[int]) -> State:
    """Returns the state of the given rows, in the given order; a row may be given several times.

    Raises:
      ValueError: no row is given, or one that there is not.
    """
    if not len(rows) or not all(-self.rows <= row < self.rows for row in rows):
      raise ValueError(f"take({list(rows)}): wanted rows of this state, 0 to {self.rows - 1}, one at least.")
    tokens = tuple(self.tokens[row] for row in rows)
    index = np.asarray(rows, np.int32)
    return dataclasses.replace(self, decode=self.decode.take(index), hidden=self.hidden[index], tokens=tokens)

  def of(self, number: int) -> State:
    """Returns the state of prompt `number` of a list: that row, or the only one, which is not copied."""
    return self if self.rows == 1 else self.take([number])

  def fork(self, count: int) -> State:
    """Returns a state of `count` rows, each a copy of this state's only row.

    Raises:
      ValueError: the state has several rows, or `count` is below 1.
    """
    if not isinstance(count, int | np.integer) or count < 1:
      raise ValueError(f"count={count}: wanted a whole number, at least 1.")
    if self.rows != 1:
      raise ValueError(f"This state has {self.rows} rows: take([row]) one to fork.")
    return self.take([0] * count)

  def on(self, mesh: Mesh | None) -> State:
    """Returns the state on a mesh, or on one device for None, wherever it was."""
    if mesh is None and len(self.hidden.sharding.device_set) == 1:
      return self
    if mesh is None:
      decode, hidden = jax.device_put((self.decode, self.hidden), jax.local_devices()[0])
    else:
      decode = placed(self.decode, self.config, mesh)
      hidden = jax.device_put(self.hidden, NamedSharding(mesh, PartitionSpec()))
    return dataclasses.replace(self, decode=decode, hidden=hidden)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the state into one file, in the format safetensors. An existing file is replaced once the new is whole.

    Args:
      path: local path of the file.

    Raises:
      OSError: the file cannot be written.
    """
    used = int(np.asarray(self.decode.cached).max(initial=0))
    arrays = {"hidden": self.hidden, **{name: getattr(self.decode, name) for name in _COUNTERS}}
    for number, layer in enumerate(self.decode.layers):
      for field in dataclasses.fields(layer):
        array = getattr(layer, field.name)
        if layer.capacity is not None:
          array = array[:, :used]  # the rest of a cache is empty
        arrays[f"layers.{number}.{field.name}"] = array
    for row, ids in enumerate(self.tokens):
      arrays[f"tokens.{row}"] = np.asarray(ids, np.int32)
    about = {
      "format": FORMAT,
      "config": self.config.to_json(),
      "checkpoint": self.checkpoint or "",
      "capacity": str(used),
    }
    file = local(path)
    if file.exists() and not file.is_file():
      raise OSError(f"{file} is a directory or a device: wanted the path of a file.")
    contents = safetensors.numpy.save({name: np.asarray(x) for name, x in arrays.items()}, about)
    try:
      with into_place(file) as temporary:
        temporary.write_bytes(contents)
    except OSError as error:
      file.with_name(file.name + TEMPORARY).unlink(missing_ok=True)
      raise OSError(f"{file} cannot be written: {error.strerror or error}") from error


class _AnotherFormat(ValueError):
  """The file is whole, and no state."""


def load_state(path: str | os.PathLike[str]) -> State:
  """Loads a state that `State.save` wrote.

  Args:
    path: local path of the file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or holds something else.
  """
  file = local(path)
  try:
    with safetensors.safe_open(file, framework="flax") as opened:
      about = opened.metadata() or {}
      if about.get("format") != FORMAT:
        raise _AnotherFormat(
          f"{file}: its format is {about.get('format')!r}: wanted {FORMAT!r}, which State.save writes."
        )
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  except (FileNotFoundError, _AnotherFormat):
    raise
  except Exception as error:  # the package raises types of its own
    raise ValueError(f"{file}: not a state, or a damaged one: {error}") from error
  try:
    return _assembled(about, arrays)
  except (KeyError, TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: a damaged state: {error}") from error


def _assembled(about: Mapping[str, str], arrays: dict[str, jax.Array]) -> State:
  config = ModelConfig.from_json(about["config"])
  names = itertools.takewhile(arrays.__contains__, map("tokens.{}".format, itertools.count()))
  tokens = tuple(np.asarray(arrays.pop(name)) for name in list(names))
  hidden, capacity = arrays.pop("hidden"), int(about["capacity"])
  counters = {name: arrays.pop(name) for name in _COUNTERS}
  rows = len(tokens)
  if not rows or not 0 <= capacity <= 2**31:
    raise ValueError(f"capacity={capacity}")
  wanted = jax.eval_shape(lambda: Transformer(config, hidden.dtype).init_state(rows, capacity))
  layers = []
  for number, layer in enumerate(wanted.layers):
    values = {}
    for field in dataclasses.fields(layer):
      name, shape = f"layers.{number}.{field.name}", getattr(layer, field.name)
      array = arrays.pop(name)
      # In float64 a state begins in float32. A memory holds keys and values in a dtype of its own.
      wide = shape.dtype if array.dtype == shape.dtype else jnp.promote_types(shape.dtype, hidden.dtype)
      values[field.name] = _checked(name, array, shape.shape, wide)
    layers.append(type(layer)(**values))
  if arrays:
    raise ValueError(f"arrays that are of no use to it: {', '.join(sorted(arrays)[:3])}")
  for name, array in counters.items():
    _checked(name, array, (rows,), jnp.int32)
  cached, position = (np.asarray(counters[name]) for name in ("cached", "position"))
  if position.min() < 0 or (position > cached).any() or cached.max() > capacity:
    raise ValueError(f"cached={cached.tolist()}, position={position.tolist()}, capacity={capacity}")
  _checked("hidden", hidden, (rows, config.hidden_size), hidden.dtype)
  for row, ids in enumerate(tokens):
    if ids.ndim != 1 or ids.dtype != np.int32 or (ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size):
      raise ValueError(f"tokens.{row} are no tokens of the vocabulary")
    if ids.size != int(counters["cached"][row]):
      raise ValueError(f"tokens.{row} are {ids.size}, and {int(counters['cached'][row])} were read")
  return State(DecodeState(tuple(layers), **counters), hidden, tokens, config, about["checkpoint"] or None)


def _checked(name: str, array: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  if array.shape != shape or array.dtype != dtype:
    raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, wanted {jnp.dtype(dtype)}{list(shape)}")
  return array
