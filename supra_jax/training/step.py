"""One optimizer step: gradients over microbatches, clipped, applied to what trains; a NaN changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supra_jax.model.adapters import AdapterConfig, add_adapters
from supra_jax.model.placement import like_params, param_shardings, parameter_name
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import Teacher, attention_transfer_loss, count_targets, language_model_loss
from supra_jax.training.optimizer import OptimizerConfig, clip, make_optimizer, make_schedule

Step = Callable[["TrainState", Any], tuple["TrainState", dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
  """What a step reads and writes.

  Attributes:
    params: float32, stacked runs.
    opt_state: one optax state a group of parameters that train; those that never do have none.
    step: int32, batches read.
    skipped: int32, how many of them changed nothing, since loss or gradient was not finite.
    skipped_in_row: int32, how many of the last ones.
  """

  params: Any
  opt_state: dict[str, Any]
  step: jax.Array
  skipped: jax.Array
  skipped_in_row: jax.Array


def parameter_groups(params: Any, patterns: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """Cuts a tree in parts, each with None for what is not in it: a part a pattern, and "frozen" for the rest.

  Args:
    params: nested dicts.
    patterns: (name, regex); a parameter is of the first group whose regex is found in its path, as in
      "run_0/mlp/up_proj/kernel".

  Raises:
    ValueError: a pattern finds no parameter that no earlier one found.
  """

  def group_of(path) -> str:
    return next((group for group, pattern in patterns if re.search(pattern, parameter_name(path))), "frozen")

  labels = jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)
  found = set(jax.tree.leaves(labels))
  for group, pattern in patterns:
    if group not in found:
      raise ValueError(f"No parameter is left to train by the regex {pattern!r}.")
  return {
    group: jax.tree.map(lambda x, label, group=group: x if label == group else None, params, labels)
    for group in [*(group for group, _ in patterns), "frozen"]
  }


def _merge(parts: dict[str, Any]) -> Any:
  def first(*leaves):
    return next(leaf for leaf in leaves if leaf is not None)

  return jax.tree.map(first, *parts.values(), is_leaf=lambda x: x is None)


class TrainStep:
  """The step of a run, and the states it works on.

  Attributes:
    model: stacked.
    optimizer: the recipe.
    num_steps: of the run; the schedule ends there.
    groups: (name, regex) of the parameters that train.
    scaled: (regex, what the learning rate of those is times that it finds).
    teacher: stacked; None where there is none. Its parameters are given to each step.
    teacher_weight, hidden_weight: as `Teacher` has them.
    adapters: that `init` adds.
    seed: of the adapters.
  """

  def __init__(
    self,
    model: Transformer,
    optimizer: OptimizerConfig,
    num_steps: int,
    groups: Sequence[tuple[str, str]] = (("all", ".*"),),
    scaled: tuple[str, float] = (".*", 1.0),
    teacher: Transformer | None = None,
    teacher_weight: float = 1.0,
    hidden_weight: float = 0.0,
    adapters: AdapterConfig = AdapterConfig(),
    seed: int = 0,
  ):
    self.model, self.optimizer, self.groups, self.scaled = model, optimizer, tuple(groups), scaled
    self.teacher, self.teacher_weight, self.hidden_weight = teacher, teacher_weight, hidden_weight
    self.adapters, self.seed = adapters, seed
    self._tx = make_optimizer(optimizer)
    self._schedule = make_schedule(optimizer, num_steps)

  def init(self, params: Any) -> TrainState:
    """The state of a run that begins with these parameters."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    if self.adapters.rank:
      params = add_adapters(params, self.adapters, self.seed)
    parts = parameter_groups(params, self.groups)
    if self.scaled[1] != 1:
      parameter_groups(params, (("scaled", self.scaled[0]),))  # an error where it finds nothing
    opt_state = {name: self._tx.init(parts[name]) for name, _ in self.groups}
    # Three arrays, not one thrice: the state is given away, and no buffer can be given twice.
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))

  def shardings(self, state: TrainState, mesh: Mesh) -> Any:
    """Where each array of a state lives, a tree like it: moments with their parameters, counters everywhere."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
      param_shardings(state.params, mesh), like_params(state.opt_state, state.params, mesh), whole, whole, whole
    )

  def compiled(self, shardings: Any, active: Sequence[str] | None = None, *, transfer: bool = False) -> Any:
    """(state, batch[, the teacher's parameters]) -> (state, metrics), jitted; the state is given away.

    A batch has leaves [microbatches, rows, T + 1]. Metrics: loss (or attention_error), grad_norm (before clipping),
    learning_rate, skipped, skipped_in_row.

    Args:
      shardings: of the state.
      active: the groups that this step trains; None means all.
      transfer: the loss is how far attention is from the teacher's.
    """
    active = [name for name, _ in self.groups] if active is None else list(active)
    whole = shardings.step

    def step(state: TrainState, batch: Any, teacher_params: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
      parts = parameter_groups(state.params, self.groups)
      training = {name: parts.pop(name) for name in active}
      loss, grads = self._gradients(training, parts, batch, teacher_params, transfer)
      grads, norm = clip(grads, self.optimizer.clip_norm)
      rate = self._schedule(state.step - state.skipped)
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)

      opt_state = dict(state.opt_state)
      for name in active:
        updates, opt_state[name] = self._tx.update(grads[name], state.opt_state[name], training[name])
        training[name] = jax.tree_util.tree_map_with_path(
          lambda path, p, u: (p - rate * self._factor(path) * u).astype(p.dtype), training[name], updates
        )
      params = _merge({**training, **parts})
      params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
      )
      bad = 1 - finite.astype(jnp.int32)
      new = TrainState(params, opt_state, state.step + 1, state.skipped + bad, (state.skipped_in_row + bad) * bad)
      metrics = {
        "attention_error" if transfer else "loss": loss,
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": new.skipped,
        "skipped_in_row": new.skipped_in_row,
      }
      return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))

  def _factor(self, path: Any) -> float:
    pattern, factor = self.scaled
    return factor if re.search(pattern, parameter_name(path)) else 1.0

  def _gradients(
    self, training: dict[str, Any], rest: dict[str, Any], batch: Any, teacher_params: Any, transfer: bool
  ) -> tuple[jax.Array, Any]:
    """What is reported, nll or attention error, and the gradients of the loss: means of all targets, float32."""
    total = count_targets(batch)
    teacher = None
    if self.teacher is not None:
      teacher = Teacher(teacher_params, self.teacher, self.teacher_weight, self.hidden_weight)

    def loss_fn(training, microbatch):
      params = _merge({**training, **rest})
      if transfer:
        assert teacher is not None, "TrainConfig wants a teacher for this"
        error = attention_transfer_loss(self.model, params, microbatch, teacher) / total
        return error, error
      sums = language_model_loss(self.model, params, microbatch, z_loss=self.optimizer.z_loss, teacher=teacher)
      return sums.loss / total, sums.nll / total

    def gradients(microbatch):
      (_, shown), grads = jax.value_and_grad(loss_fn, has_aux=True)(training, microbatch)
      return shown, grads

    if batch["tokens"].shape[0] == 1:
      return gradients(jax.tree.map(lambda x: x[0], batch))

    def add(total, microbatch):
      return jax.tree.map(jnp.add, total, gradients(microbatch)), None

    return jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, training)), batch)[0]
