"""The training step: gradients summed over microbatches, clipped and applied; skipped if loss or norm is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supra_jax.core.sharding import check_heads
from supra_jax.model.adapters import AdapterConfig, add_adapters, merge_adapters
from supra_jax.model.placement import like_params, param_shardings
from supra_jax.model.shapes import parameter_shapes
from supra_jax.model.stacking import unstack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import Teacher, attention_transfer_loss, count_targets, language_model_loss
from supra_jax.training.groups import label_parameters, merge, split
from supra_jax.training.optimizer import OptimizerConfig, clip, make_optimizer, make_schedule

Step = Callable[["TrainState", Any], tuple["TrainState", dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
  """The state of a run that a step reads and replaces.

  Attributes:
    params: float32 parameters, stacked (`stacking.stack_layers`).
    opt_state: name of a group -> optax state of the group's parameters. Frozen parameters have no optax state.
    step: int32, number of batches read.
    skipped: int32, number of batches that changed no parameter, since their loss or gradient was not finite.
    skipped_in_row: int32, number of batches skipped since the last batch that was not.
  """

  params: Any
  opt_state: dict[str, Any]
  step: jax.Array
  skipped: jax.Array
  skipped_in_row: jax.Array


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct`s with the shapes and dtypes of one tree and the shardings of another."""
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


class TrainStep:
  """Makes the compiled training step of a run, and the states that the step reads and replaces.

  Attributes:
    model: the transformer that trains, stacked.
    optimizer: the optimizer's config.
    groups: (name, regex) of each group of parameters that train.
    shapes: `jax.ShapeDtypeStruct` of each parameter that `init` takes.
    labels: a `Label` for each parameter of the state, adapters included.
    teacher: the transformer to distil from, stacked; None: no teacher. Each step takes the teacher's parameters as an
      argument.
    teacher_weight, hidden_weight: `weight` and `hidden_weight` of `losses.Teacher`.
    adapters: config of the adapters that `init` adds.
    seed: seed of the adapters' initial values.
  """

  def __init__(
    self,
    model: Transformer,
    optimizer: OptimizerConfig,
    num_steps: int,
    groups: Sequence[tuple[str, str]] = (("all", ".*"),),
    new: tuple[str, float] = (".*", 1.0),
    teacher: Transformer | None = None,
    teacher_weight: float = 1.0,
    hidden_weight: float = 0.0,
    adapters: AdapterConfig = AdapterConfig(),
    seed: int = 0,
  ):
    """Labels the parameters and makes the optimizer.

    Args:
      model, optimizer, groups, teacher, teacher_weight, hidden_weight, adapters, seed: see the attributes.
      num_steps: number of steps of the run, at which the learning-rate schedule ends.
      new: (regex of new weights, learning-rate multiplier of the new weights).

    Raises:
      ValueError: a group has no parameter, or the multiplier differs from 1 and applies to no parameter.
    """
    self.model, self.optimizer, self.groups = model, optimizer, tuple(groups)
    self.teacher, self.teacher_weight, self.hidden_weight = teacher, teacher_weight, hidden_weight
    self.adapters, self.seed = adapters, seed
    self.shapes = parameter_shapes(model)
    self.labels = label_parameters(jax.eval_shape(self._trained, self.shapes), groups, new)
    self._tx = make_optimizer(optimizer)
    self._schedule = make_schedule(optimizer, num_steps)

  @property
  def group_names(self) -> tuple[str, ...]:
    return tuple(name for name, _ in self.groups)

  def init(self, params: Any) -> TrainState:
    """Returns the state before the first step, given the stacked parameters to start from (without adapters)."""
    params = self._trained(params)
    parts = split(params, self.labels, self.group_names)
    opt_state = {name: self._tx.init(parts[name]) for name in self.group_names}
    # Separate buffers: the state is donated, and one buffer cannot be donated twice.
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))

  def _trained(self, params: Any) -> Any:
    """Returns the parameters in float32, with adapters added if `adapters` has a rank above 0."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return add_adapters(params, self.adapters, self.seed) if self.adapters.rank else params

  def finished(self, params: Any) -> Any:
    """Returns a state's parameters as a model directory holds them: unstacked, adapters merged into the kernels."""
    params = jax.jit(merge_adapters)(params) if self.adapters.rank else params
    return unstack_layers(params, self.model.config)

  def state_shapes(self, mesh: Mesh) -> TrainState:
    """Returns a `TrainState` with a `jax.ShapeDtypeStruct`, with sharding, in place of each array; allocates nothing.

    Raises:
      ValueError: the model cannot be cut over the mesh.
    """
    model = self.model.config
    check_heads(model.num_heads, model.num_kv_heads, mesh)
    shapes = jax.eval_shape(self.init, self.shapes)
    return with_shardings(shapes, self.shardings(shapes, mesh))

  def shardings(self, state: TrainState, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a state: moments as their parameters, all else replicated."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
      param_shardings(state.params, mesh), like_params(state.opt_state, state.params, mesh), whole, whole, whole
    )

  def compiled(self, shardings: Any, active: Sequence[str] | None = None, *, transfer: bool = False) -> Any:
    """Returns the jitted step: (state, batch[, teacher's parameters]) -> (new state, metrics); the state is donated.

    A batch has leaves int32 [microbatches, rows, T + 1]. The metrics are scalars: loss, the mean cross-entropy in nats
    per token (with `transfer`: attention_error in its place), grad_norm (before clipping), learning_rate, skipped and
    skipped_in_row.

    Args:
      shardings: shardings of the state, as the method `shardings` returns them.
      active: names of the groups that the step trains; None means all.
      transfer: whether the loss is `layer_losses.attention_error` alone; needs a teacher.
    """
    active = self.group_names if active is None else tuple(active)
    whole = shardings.step
    labels = split(self.labels, self.labels, self.group_names)

    def step(state: TrainState, batch: Any, teacher_params: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
      parts = split(state.params, self.labels, self.group_names)
      training = {name: parts.pop(name) for name in active}
      loss, grads = self._gradients(training, parts, batch, teacher_params, transfer)
      grads, norm = clip(grads, self.optimizer.clip_norm)
      rate = self._schedule(state.step - state.skipped)
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)

      opt_state = dict(state.opt_state)
      for name in active:
        updates, opt_state[name] = self._tx.update(grads[name], state.opt_state[name], training[name])
        training[name] = jax.tree.map(
          lambda p, u, label: (p - rate * label.rate * u).astype(p.dtype), training[name], updates, labels[name]
        )
      params = merge({**training, **parts})
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

  def _gradients(
    self, training: dict[str, Any], rest: dict[str, Any], batch: Any, teacher_params: Any, transfer: bool
  ) -> tuple[jax.Array, Any]:
    """Returns (cross-entropy or attention error, gradients of the loss), means over the batch's targets, float32."""
    total = count_targets(batch)
    teacher = None
    if self.teacher is not None:
      teacher = Teacher(teacher_params, self.teacher, self.teacher_weight, self.hidden_weight)

    def loss_fn(training, microbatch):
      params = merge({**training, **rest})
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
