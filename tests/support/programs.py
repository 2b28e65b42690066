"""A binary run in this process: what `python -m MODULE FLAGS` does, without seconds of imports and compilation."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver

from benchmarks import runs

OURS = ("supra_jax", "convert_weights")
app.define_help_flags()  # as absl's own, or they would be a program's, and absl defines them but once


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs a module as a program: flags parsed anew by absl, what it prints captured, its exit status returned.

  An exception that the program does not make a message of comes through: of a process it would be the traceback.
  """
  out, err = io.StringIO(), io.StringIO()
  with (
    own_flags(),
    _own_logging(),
    mock.patch.object(sys, "argv", [module, *arguments]),
    warnings.catch_warnings(),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    # That this process has imported it too.
    warnings.filterwarnings("ignore", message=r".*found in sys\.modules", category=RuntimeWarning)
    status: object = None
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
      status = ended.code
    if isinstance(status, str):  # as the interpreter does
      print(status, file=sys.stderr)
      status = 1
  return subprocess.CompletedProcess([module, *arguments], status or 0, out.getvalue(), err.getvalue())


def succeeds_on_devices(number: int, *arguments: str) -> None:
  """Runs Python in a process of its own, whose CPU pretends to be so many devices; it has to end well."""
  environment = os.environ | runs.devices_environment(number) | {"JAX_PLATFORMS": "cpu"}
  ran = subprocess.run(
    [sys.executable, *arguments], cwd=runs.ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert ran.returncode == 0, ran.stderr[-2000:]


@contextlib.contextmanager
def own_flags() -> Iterator[None]:
  """absl's flags without those of binaries that this process imported, and afterwards as they were."""
  FLAGS = flags.FLAGS
  values, parsed = flagsaver.save_flag_values(), FLAGS.is_parsed()
  modules = {name: str(FLAGS.find_module_defining_flag(name)) for name in FLAGS}
  hidden = {name: FLAGS[name] for name, module in modules.items() if module.startswith(OURS)}
  for name in hidden:
    delattr(FLAGS, name)
  try:
    yield
  finally:
    # What libraries define while they are imported stays: they are imported once.
    for name in list(FLAGS):
      if (name in hidden or name not in modules) and not _of_a_library(name):
        delattr(FLAGS, name)
    for name, flag in hidden.items():
      FLAGS[name] = flag
      FLAGS.register_flag_by_module(modules[name], flag)
    flagsaver.restore_flag_values(values)
    if not parsed:
      FLAGS.unparse_flags()


def _of_a_library(name: str) -> bool:
  module = flags.FLAGS.find_module_defining_flag(name)
  return module in sys.modules and not str(module).startswith((*OURS, "ml_collections"))


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
  """Handlers, filters and levels of loggers as they were, afterwards."""
  loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio", "gcsfs")]
  before = [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
  try:
    yield
  finally:
    for logger, (level, handlers, filters) in zip(loggers, before, strict=True):
      logger.setLevel(level)
      logger.handlers[:], logger.filters[:] = handlers, filters
