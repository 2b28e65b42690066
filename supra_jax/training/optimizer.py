"""The paper's recipe: AdamW, clipped, on a warmup and a cosine (arXiv 2405.06640, section 7), or less memory.

Clipping and the learning rate are apart from the moments, since a run may train groups of parameters in stages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An optimizer and its schedule.

  Attributes:
    kind: `adamw` keeps two moments a parameter; `adafactor` the row and column means of the squares (Shazeer and Stern
      2018), with updates clipped to a root mean square of 1, and neither momentum nor scaling by the parameter.
    moment_dtype: of AdamW's first moment; bfloat16 saves 2 bytes a parameter. The second is always float32: small
      increments would be lost on bfloat16.
    learning_rate: reached at the end of the warmup.
    end_learning_rate: where the cosine ends, one step after the last, as in the reference.
    warmup_steps: of linear growth; step n of them (from 0) takes (n + 1) / warmup_steps of the rate.
    beta1, beta2, eps: of AdamW.
    weight_decay: times the learning rate.
    decay_what: `matrices` leaves norms and biases alone; `all` decays every parameter.
    clip_norm: of the whole gradient; 0 means no clipping.
    z_loss: weight of mean(logsumexp^2) in the loss.
  """

  kind: Literal["adamw", "adafactor"] = "adamw"
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
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
    choices = {
      "kind": ("adamw", "adafactor"),
      "moment_dtype": ("float32", "bfloat16"),
      "decay_what": ("matrices", "all"),
    }
    for name, wanted in choices.items():
      if getattr(self, name) not in wanted:
        raise ValueError(f"optimizer.{name}={getattr(self, name)!r}: wanted {' or '.join(map(repr, wanted))}.")
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


def clip(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
  """(gradients of norm `max_norm` at most, their norm before); 0 leaves them as they are."""
  norm = optax.tree.norm(grads)
  factor = max_norm / jnp.maximum(norm, max_norm) if max_norm else jnp.ones(())
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipped gradients -> what times the learning rate is taken from the parameters."""
  if config.kind == "adafactor":
    moments = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  else:
    moments = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype))
  mask = _decay_mask if config.decay_what == "matrices" else None
  return optax.chain(moments, optax.add_decayed_weights(config.weight_decay, mask))
