"""The entry point of every program: silences libraries, and turns errors into one-line messages."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags

from supra_jax.bin.options import find_base, parse, unknown_option
from supra_jax.bin.quiet import silence
from supra_jax.core.preemption import CTRL_C, STATUSES, Preempted, as_python_does
from supra_jax.core.programs import keep_programs

DTYPES = ("float32", "bfloat16", "float16")  # dtypes that a model can run in
_CLIENTS = ("aiohttp", "gcsfs", "google")  # packages that access buckets: their exceptions are network errors


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`.

  Bad overrides of a recipe, bad input (ValueError, OSError or NotImplementedError from `main`) and network errors end
  the program with one line on stderr and status 1, Ctrl-C with 130. A run that a signal or the time ended says so.
  """

  def absl_main(argv: list[str]) -> None:
    if argv[1:]:
      raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
      silence()
    keep_programs()
    as_python_does()
    try:
      main()
    except (ValueError, OSError, NotImplementedError) as error:
      sys.exit(f"error: {error}")
    except Preempted as preempted:
      print(preempted)
      sys.exit(STATUSES.get(preempted.by, 0))
    except KeyboardInterrupt:
      sys.exit(STATUSES[CTRL_C])
    except Exception as error:
      if type(error).__module__.partition(".")[0] not in _CLIENTS:
        raise
      sys.exit(f"error: the bucket cannot be reached: {error}")

  app.run(absl_main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  find_base(argv)
  try:
    return parse(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # ml_collections rejects overrides and config files with these. It may wrap a KeyError, whose str() adds quotes:
    # unwrap to the innermost message.
    cause: object = error
    while isinstance(cause, BaseException) and not isinstance(cause, OSError) and cause.args:
      cause = cause.args[0]
    sys.exit(f"error: {unknown_option(argv) or cause}")
