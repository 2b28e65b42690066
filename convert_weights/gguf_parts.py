"""Opens a GGUF model that is one file, or several parts made by gguf-split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from convert_weights.errors import ConversionError, listing
from convert_weights.gguf_file import GGUFFile, open_gguf
from convert_weights.source import StoredTensor

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_names(name: str) -> list[str]:
  """Returns the names of all parts of the model to which a file belongs; the file's own name if there are no parts."""
  part = _PART.fullmatch(name)
  if part is None:
    return [name]
  return [f"{part['stem']}-{number:05}-of-{part['count']}.gguf" for number in range(1, int(part["count"]) + 1)]


def first_parts(names: Iterable[str]) -> list[str]:
  """Returns the name of the first part of each GGUF model that has a part among `names`, which may lack the first."""
  return sorted({part_names(name)[0] for name in names if name.endswith(".gguf")})


def open_parts(path: Path) -> tuple[list[Path], GGUFFile]:
  """Opens the model to which a GGUF file belongs.

  Args:
    path: path of the file, which may be any part of the model.

  Returns:
    The paths of all parts, and a header with the metadata of the first part and the tensors of all parts.

  Raises:
    ConversionError: a part is missing, is corrupt, belongs to another model, or repeats a tensor of another part.
  """
  paths = [path.with_name(name) for name in part_names(path.name)]
  missing = [part.name for part in paths if not part.exists()]
  if missing and len(paths) > 1:
    raise ConversionError("\n".join([f"{path}: part of a model.", *listing("missing parts", missing)]))
  files = [open_gguf(part) for part in paths]
  tensors: dict[str, StoredTensor] = {}
  for number, (part, file) in enumerate(zip(paths, files, strict=True)):
    found = tuple(file.metadata.get(key, default) for key, default in (("split.no", 0), ("split.count", 1)))
    # A model in one file has split.count 1 or 0, or no such key.
    if found != (number, len(paths)) and not (len(paths) == 1 and found == (0, 0)):
      raise ConversionError(
        f"{part}: split.no={found[0]!r}, split.count={found[1]!r}: its name says that it is part {number + 1} of "
        f"{len(paths)}. Parts are named NAME-00001-of-00003.gguf."
      )
    twice = sorted(tensors.keys() & file.tensors.keys())
    if twice:
      raise ConversionError("\n".join([f"{part}: refused.", *listing("tensors in two parts", twice)]))
    tensors.update(file.tensors)
  return paths, GGUFFile(files[0].metadata, tensors)
