"""Synchronisation of the processes of a multi-process run."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def together(what: str) -> None:
  """Barrier: waits until all processes have called it with the same name `what`; a single process does not wait."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
