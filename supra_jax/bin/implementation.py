"""The flag --implementation of programs that run linear attention."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from kernels_pallas import verdict
from kernels_pallas.api import IMPLEMENTATIONS

flags.disclaim_key_flags()  # --help of each program lists them as its own
_HELP = "Implementation of linear attention. auto: what supra_jax.bin.doctor found right and fast on this device."


def with_implementation(main: Callable[[], None]) -> Callable[[], None]:
  """Defines the flag, and returns `main` in which "auto" means the implementation that the flag names."""
  named = flags.DEFINE_enum("implementation", "auto", ["auto", *IMPLEMENTATIONS], _HELP)

  def run() -> None:
    if named.value == "auto":
      return main()
    with verdict.using(named.value):
      return main()

  return run
