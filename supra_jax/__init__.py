"""SUPRA in JAX: a pretrained transformer becomes an RNN (arXiv 2405.06640)."""

import importlib
from typing import TYPE_CHECKING, Any

from supra_jax.core.xla_gpu import avoid_crash

if TYPE_CHECKING:
  from supra_jax.evaluation.likelihood import evaluate
  from supra_jax.inference.lm import LM, load
  from supra_jax.inference.state import load_state
  from supra_jax.linearization.linearize import linearize
  from supra_jax.linearization.starts import Calibrated, Identity, Memory, Random, Window
  from supra_jax.model.config import ModelConfig
  from supra_jax.training.config import TrainConfig
  from supra_jax.training.loop import train

__all__ = [
  "LM", "Calibrated", "Identity", "Memory", "ModelConfig", "Random", "TrainConfig", "Window", "evaluate", "linearize",
  "load", "load_state", "train",
]  # fmt: skip
_MODULES = {
  "evaluation.likelihood": ("evaluate",),
  "inference.lm": ("LM", "load"),
  "inference.state": ("load_state",),
  "linearization.linearize": ("linearize",),
  "linearization.starts": ("Calibrated", "Identity", "Memory", "Random", "Window"),
  "model.config": ("ModelConfig",),
  "training.config": ("TrainConfig",),
  "training.loop": ("train",),
}

avoid_crash()


def __dir__() -> list[str]:
  return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
  # Imported when first asked for, so that processes that only pack text need not import jax.
  for module, names in _MODULES.items():
    if name in names:
      return getattr(importlib.import_module(f"supra_jax.{module}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
