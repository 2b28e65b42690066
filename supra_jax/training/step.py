"""One optimizer step: gradients over microbatches, clipped, applied to what trains; a NaN changes nothing."""

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
  """What a step reads and writes.

  Attributes:
    params: float32, layers of one kind in a row as one stack.
    opt_state: group -> optax state of its parameters. Frozen parameters have none.
    step: int32, number of batches read.
    skipped: int32, number of batches that changed nothing, since their loss or gradient was not finite.
    skipped_in_row: int32, how many of the last batches in a row were skipped.
  """

  params: Any
  opt_state: dict[str, Any]
  step: jax.Array
  skipped: jax.Array
  skipped_in_row: jax.Array


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """jax.ShapeDtypeStruct of each shape, with its sharding."""
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


class TrainStep:
  """The step of a run, and the states it works on.

  Attributes:
    model: the transformer that trains.
    optimizer: the optimizer's config.
    groups: (name, regex) of the groups of parameters that train.
    shapes: jax.ShapeDtypeStruct of the parameters that `init` takes.
    labels: a `Label` for each parameter of the state, adapters included.
    teacher: the transformer to distil from; None where there is none. Its parameters are given to each step.
    teacher_weight, hidden_weight: weights of its losses, see `losses.Teacher`.
    adapters: which adapters `init` adds.
    seed: seed of the adapters.
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
      num_steps: number of steps of the run, after which the schedule ends.
      new: (regex of new weights, multiplier of their learning rate).

    Raises:
      ValueError: a regex finds no parameter that could train.
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
    """The state of a run that begins with these parameters."""
    params = self._trained(params)
    parts = split(params, self.labels, self.group_names)
    opt_state = {name: self._tx.init(parts[name]) for name in self.group_names}
    # Separate buffers: the state is donated, and one buffer cannot be donated twice.
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))

  def _trained(self, params: Any) -> Any:
    """Parameters in float32, with adapters if there are any."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return add_adapters(params, self.adapters, self.seed) if self.adapters.rank else params

  def finished(self, params: Any) -> Any:
    """A state's parameters as a model directory has them: one subtree a layer, adapters merged into their kernels."""
    params = jax.jit(merge_adapters)(params) if self.adapters.rank else params
    return unstack_layers(params, self.model.config)

  def state_shapes(self, mesh: Mesh) -> TrainState:
    """jax.ShapeDtypeStruct, with its sharding, of every array of a state.

    Raises:
      ValueError: the model cannot be cut over the mesh.
    """
    model = self.model.config
    check_heads(model.num_heads, model.num_kv_heads, mesh)
    shapes = jax.eval_shape(self.init, self.shapes)
    return with_shardings(shapes, self.shardings(shapes, mesh))

  def shardings(self, state: TrainState, mesh: Mesh) -> Any:
    """Where each array of a state lives, a tree like it: moments with their parameters, counters everywhere."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
      param_shardings(state.params, mesh), like_params(state.opt_state, state.params, mesh), whole, whole, whole
    )

  def compiled(self, shardings: Any, active: Sequence[str] | None = None, *, transfer: bool = False) -> Any:
    """(state, batch[, the teacher's parameters]) -> (state, metrics), jitted; the state is donated.

    A batch has leaves [microbatches, rows, T + 1]. Metrics: loss (or attention_error), grad_norm (before clipping),
    learning_rate, skipped, skipped_in_row.

    Args:
      shardings: of the state.
      active: the groups that this step trains; None means all.
      transfer: the loss is how far attention is from the teacher's.
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
    """What is reported, nll or attention error, and the gradients of the loss: means of all targets, float32."""
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
