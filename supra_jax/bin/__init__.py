import sys

from supra_jax.core.preemption import at_once

if sys.argv[:1] == ["-m"]:
  at_once()  # until the flags are read: no traceback out of an import
