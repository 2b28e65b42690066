"""Finds the flags of a program, also where its `main` is imported and called by other code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags


def flags_of(define: Callable[[], None], name: str) -> flags.FlagValues:
  """Returns the flags of the process, a program's flags among them.

  Defines the program's flags and parses the command line if the importer of the program has not called `define`.

  Args:
    define: defines the flags of the program.
    name: name of one of these flags. If this flag is defined, `define` has been called.
  """
  if name not in flags.FLAGS:
    define()
    flags.FLAGS(sys.argv)
  return flags.FLAGS
