"""What several processes do together."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def together(what: str) -> None:
  """Waits until all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)
