"""Verdicts: the kernels that were found right and fast on a device, which `implementation="auto"` obeys.

`python -m supra_jax.bin.doctor` tries CANDIDATES on a device and writes a verdict below the user's cache directory,
`~/.cache/supra_jax/verdicts`. It holds for one kind of device, one set of versions and one state of this package's
sources; where there is none, "auto" takes no kernel. A CPU needs none.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Choice(NamedTuple):
  """A kernel, and the operands for which "auto" may choose it.

  Attributes:
    platform: name of the platform in `jax.lax.platform_dependent`.
    dtype: name of the dtype of q, k and v.
    widths: least and largest width of keys and values.
    tokens: least number of tokens per row, T; shorter rows are as fast without a kernel.
    implementation: a key of `api.IMPLEMENTATIONS`.
  """

  platform: str
  dtype: str
  widths: tuple[int, int]
  tokens: int
  implementation: str


Choices = tuple[Choice, ...]

# What may become a verdict's choices, once it was tried on a device.
CANDIDATES: Choices = (
  Choice("cuda", "bfloat16", (16, 256), 64, "mosaic_gpu"),
  Choice("cuda", "bfloat16", (16, 256), 64, "triton"),
  Choice("cuda", "float32", (16, 128), 64, "triton"),
  Choice("tpu", "bfloat16", (32, 256), 64, "tpu"),
  Choice("tpu", "float32", (32, 256), 64, "tpu"),
)
# Distributions whose versions a verdict belongs to, of those that are installed.
_VERSIONED = (
  "jax",
  "jaxlib",
  "jax-cuda12-plugin",
  "jax-cuda13-plugin",
  "nvidia-cuda-nvcc-cu12",
  "nvidia-cuda-nvcc",
  "libtpu",
)
_PLATFORMS = {"gpu": "cuda"}  # jax's name of a device's platform -> its name in a `Choice`
_used: Choices | str | None = None


def directory() -> Path:
  """Returns the directory of verdicts; supra_jax keeps its compiled programs beside it.

  Raises:
    OSError: the user has no home directory, nor XDG_CACHE_HOME.
  """
  chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
  try:
    cache = chosen if chosen.is_absolute() else Path("~/.cache").expanduser()
  except RuntimeError as error:
    raise FileNotFoundError("You have no home directory for the verdict: set XDG_CACHE_HOME to a directory.") from error
  return cache / "supra_jax" / "verdicts"


@functools.cache
def versions() -> dict[str, str]:
  """Returns name -> version of all that a kernel is compiled by, and a hash of this package's sources."""
  found = {}
  for name in _VERSIONED:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
  return found | {"kernels_pallas": hashlib.sha256(sources).hexdigest()[:12]}


def slug(name: str) -> str:
  """Returns the name of a device as a part of a file's name."""
  return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def path_of(kind: str) -> Path:
  """Returns the path of the verdict on a kind of device (`jax.Device.device_kind`), under the versions installed."""
  key = hashlib.sha256(repr((kind, sorted(versions().items()))).encode()).hexdigest()[:8]
  return directory() / f"{slug(kind)}_{key}.json"


def write(kind: str, choices: Choices, report: Mapping[str, Any]) -> Path:
  """Writes a verdict in place of an earlier one, and returns its path.

  Args:
    kind: the kind of device.
    choices: what "auto" is to choose from, best first.
    report: what was tried and measured, as JSON values.

  Raises:
    OSError: the file cannot be written.
  """
  path = path_of(kind)
  path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  contents = {"device": kind, "versions": versions(), "choices": to_json(choices), **report}
  with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
    file.write(json.dumps(contents, indent=1, allow_nan=False) + "\n")
  os.replace(file.name, path)
  _read.cache_clear()
  return path


def parse(values: Any) -> Choices | str:
  """Parses what `to_json` returned.

  Raises:
    ValueError: it is something else.
  """
  if isinstance(values, str):
    return values
  try:
    return tuple(Choice(**{**row, "widths": (int(row["widths"][0]), int(row["widths"][1]))}) for row in values)
  except (TypeError, KeyError, IndexError) as error:
    raise ValueError(f"{values!r}: wanted choices of kernels") from error


@functools.cache
def _read(kind: str) -> Choices | None:
  try:
    path = path_of(kind)
    choices = parse(json.loads(path.read_text())["choices"])
    if isinstance(choices, str):
      raise ValueError(f"{choices!r}: wanted choices of kernels")
    return choices
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as error:
    _say(f"{path}: this verdict on kernels cannot be read ({error}): run `python -m supra_jax.bin.doctor` again.")
    return None


@functools.cache
def _say(message: str) -> None:
  """Prints a message to stderr, once."""
  if jax.process_index() == 0:
    print(message, file=sys.stderr)


def device() -> tuple[str, str]:
  """Returns (kind, platform as in `Choice`) of the device that programs are traced for."""
  there = jax.sharding.get_abstract_mesh().abstract_device
  if there is None:
    there = jax.devices()[0]
  return there.device_kind, _PLATFORMS.get(there.platform, there.platform)


def of_this_device() -> Choices:
  """Returns the choices of the verdict on the device that programs are traced for; says it once if there is none."""
  kind, platform = device()
  if platform == "cpu":
    return ()
  found = _read(kind)
  if found is None:
    _say(
      f"{kind}: linear attention runs without kernels, since none has been tried on this device with these versions. "
      "To try them, and use those that are right and fast from then on: python -m supra_jax.bin.doctor"
    )
  return found or ()


@contextlib.contextmanager
def using(meaning: Choices | str) -> Iterator[None]:
  """While it lasts, "auto" chooses from these choices, or is the implementation of this name, whatever verdicts say."""
  global _used
  before, _used = _used, meaning
  try:
    yield
  finally:
    _used = before


def used() -> Choices | str | None:
  """Returns what the innermost `using` was given; None outside of any."""
  return _used


def in_force() -> Choices | str:
  """Returns what "auto" means: what `using` was given, else the choices of the verdict on this device.

  Each of several processes could read another verdict, and compile another program than the others: there, without
  `using`, no kernel is chosen. `agreed` makes one verdict of theirs.
  """
  if _used is not None:
    return _used
  if jax.process_count() > 1 and device()[1] != "cpu":
    _say("Several processes: linear attention runs without kernels, except under `kernels_pallas.verdict.using`.")
    return ()
  return of_this_device()


def to_json(meaning: Choices | str) -> Any:
  """Returns what "auto" means as JSON values, which `parse` parses."""
  return meaning if isinstance(meaning, str) else [row._asdict() for row in meaning]


def agreed(meaning: Choices | str) -> Choices | str:
  """Returns to all processes what process 0 gave. All call it together."""
  if jax.process_count() == 1:
    return meaning
  text = np.frombuffer(json.dumps(to_json(meaning), allow_nan=False).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  padded = np.zeros(length, np.uint8)
  padded[: len(text)] = text[:length]
  return parse(json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))))
