"""The paper's optimizer: AdamW with clipping, warmup and cosine (arXiv 2405.06640, section 7); or Adafactor.

Clipping and the learning-rate schedule are functions of their own, not part of the optax transformation: the gradient
of all groups of parameters is clipped as one, but every group has moments of its own, since a run may train its groups
in stages.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from supra_jax.core.schema import AtLeast, check


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The config of an optimizer and of its learning-rate schedule.

  Attributes:
    kind: `adamw` keeps two moments for each parameter. `adafactor` keeps the row and column means of squared gradients
      (Shazeer and Stern 2018); it clips updates to a root mean square of 1, and has neither momentum nor scaling by the
      parameter.
    moment_dtype: dtype of AdamW's first moment; bfloat16 saves 2 bytes per parameter. The second moment is always
      float32, since bfloat16 would lose its small increments.
    learning_rate: learning rate at the end of the warmup, where the cosine starts.
    end_learning_rate: learning rate at the end of the cosine, which the schedule would reach one step after the run's
      last step, as in the reference implementation.
    warmup_steps: number of steps of linear warmup; step n (from 0) has (n + 1) / warmup_steps of `learning_rate`.
    beta1, beta2, eps: AdamW's constants.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    decay_what: `matrices` decays kernels and embeddings, but no norms and biases; `all` decays every parameter.
    clip_norm: the L2 norm that the gradient of all parameters together is clipped to; 0 means no clipping.
    z_loss: weight of mean(logsumexp(logits)^2) in the loss.
  """

  kind: Literal["adamw", "adafactor"] = "adamw"
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
  learning_rate: Annotated[float, AtLeast(0)] = 3e-5
  end_learning_rate: Annotated[float, AtLeast(0)] = 1e-5
  warmup_steps: Annotated[int, AtLeast(0)] = 1000
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: Annotated[float, AtLeast(0)] = 0.1
  decay_what: Literal["matrices", "all"] = "matrices"
  clip_norm: Annotated[float, AtLeast(0)] = 1.0
  z_loss: Annotated[float, AtLeast(0)] = 1e-4

  def __post_init__(self):
    check(self, "optimizer")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns a function: number of a step, from 0 -> learning rate, a linear warmup and then half a cosine.

  Args:
    config: the learning rates and the number of warmup steps.
    num_steps: number of steps of the run; the cosine ends there.
  """

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
  """Returns (gradients scaled to an L2 norm of at most `max_norm`, their norm before); 0 for `max_norm`: no scaling."""
  norm = optax.tree.norm(grads)
  factor = max_norm / jnp.maximum(norm, max_norm) if max_norm else jnp.ones(())
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Makes the optax transformation of clipped gradients into updates u; a step subtracts learning rate * u."""
  if config.kind == "adafactor":
    moments = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  else:
    moments = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype))
  mask = _decay_mask if config.decay_what == "matrices" else None
  return optax.chain(moments, optax.add_decayed_weights(config.weight_decay, mask))
