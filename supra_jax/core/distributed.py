"""Synchronises the processes of a multi-process run."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def together(what: str) -> None:
  """Waits until all processes have called `together` with the same `what` (a barrier); a single process never waits."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
