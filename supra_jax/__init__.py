"""SUPRA in JAX: a pretrained transformer becomes an RNN (arXiv 2405.06640)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from supra_jax.inference.lm import LM, load

__all__ = ["LM", "load"]


def __getattr__(name: str) -> Any:
  # When first asked for, so that processes that only pack text need not import jax.
  if name in __all__:
    from supra_jax.inference import lm

    return getattr(lm, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
