"""The paper's recipe: AdamW, clipped, on a warmup and a cosine (arXiv 2405.06640, section 7)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    learning_rate: reached at the end of the warmup.
    end_learning_rate: where the cosine ends, one step after the last, as in the reference.
    warmup_steps: of linear growth; step n of them (from 0) takes (n + 1) / warmup_steps of the rate.
    beta1, beta2, eps, weight_decay: of AdamW.
    decay_what: `matrices` leaves norms and biases alone; `all` decays every parameter.
    clip_norm: of the whole gradient; 0 means no clipping.
    z_loss: weight of mean(logsumexp^2) in the loss.
  """

  learning_rate: float = 3e-5
  end_learning_rate: float = 1e-5
  warmup_steps: int = 1000
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_what: Literal["matrices", "all"] = "matrices"
  clip_norm: float = 1.0
  z_loss: float = 1e-4

  def __post_init__(self):
    if self.decay_what not in ("matrices", "all"):
      raise ValueError(f"optimizer.decay_what={self.decay_what!r}: wanted 'matrices' or 'all'.")
    for name in ("learning_rate", "end_learning_rate", "warmup_steps", "weight_decay", "clip_norm", "z_loss"):
      if getattr(self, name) < 0:
        raise ValueError(f"optimizer.{name}={getattr(self, name)}: wanted 0 or more.")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate of step 0, 1, ...: linear warmup, then half a cosine."""

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warm = config.learning_rate * (step + 1) / max(config.warmup_steps, 1)
    done = jnp.clip((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 0, 1)
    span = config.learning_rate - config.end_learning_rate
    cosine = config.end_learning_rate + 0.5 * span * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < config.warmup_steps, warm, cosine)

  return schedule


def _decay_mask(params: Any) -> Any:
  # By name, not by rank: stacked runs give norms a second axis.
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Clip, then AdamW on `make_schedule`."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.adamw(
      make_schedule(config, num_steps),
      b1=config.beta1,
      b2=config.beta2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decay_mask if config.decay_what == "matrices" else None,
    ),
  )
