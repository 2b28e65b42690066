"""How a `main` that was imported finds its flags."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags


def flags_of(define: Callable[[], None], name: str) -> flags.FlagValues:
  """The flags of the process and those of a program; defines and parses the latter if the importer has not.

  Args:
    define: defines the flags of the program.
    name: one of these flags. Whether it is defined says whether the importer called `define`.
  """
  if name not in flags.FLAGS:
    define()
    flags.FLAGS(sys.argv)
  return flags.FLAGS
