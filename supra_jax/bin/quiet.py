"""Silences what libraries print beside the errors that they raise."""

from __future__ import annotations

import logging as python_logging
import sys
import threading
import warnings

from absl import logging


def silence() -> None:
  """Silences, for the rest of the process, what jax, Orbax, tensorstore and the bucket clients print.

  A warning becomes one line.
  """
  logging.set_verbosity(logging.ERROR)  # jax and orbax log much that users need not know
  # Orbax and the bucket clients log an error's traceback in each thread and task, and raise the error as well.
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  for name in ("asyncio", "gcsfs"):
    python_logging.getLogger(name).setLevel("CRITICAL")
  # When a read fails, each of tensorstore's threads that are at others would print a traceback of its own.
  sys.unraisablehook = _of_main_thread
  warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)


def _of_main_thread(raised: sys.UnraisableHookArgs) -> None:
  if threading.current_thread() is threading.main_thread():
    sys.__unraisablehook__(raised)
