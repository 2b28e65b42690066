"""Plans the memory, traffic and FLOPs of a recipe without weights or devices, by compiling its training step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from supra_jax.core.files import place
from supra_jax.core.sharding import TIME_AXIS, batch_sharding, batch_shards, make_mesh, mesh_sizes
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import step_flops_per_token
from supra_jax.model.presets import PRESETS
from supra_jax.storage.model_directory import load_model_without_params
from supra_jax.training.compiled import Memory, Traffic, collectives, memory
from supra_jax.training.config import TrainConfig
from supra_jax.training.groups import FROZEN
from supra_jax.training.setup import check_batch, make_train_step, row_leaves, teacher_shapes

# Temporaries of Mistral-7B on fsdp:8, in GB per device, compiled for CPU, H100 and TPU v5p: 16.0, 12.8 and 17.8 with 2
# rows per device in each of two microbatches; with 16 rows 46.5 (CPU) and 28.4 (H100).
CPU_NOTE = """\
Compiled for CPU devices: temporaries of an accelerator's compiler will differ. XLA's CPU backend widens bfloat16 to
float32 in products and collectives, so that weights and activations move twice their bytes, and it sums gradients by
all-reduce where others use reduce-scatter. 7B models took from 0.6 (16 rows a device) to 0.8 (2 rows) of these
temporaries compiled for H100s, and 1.1 for TPU v5p (2 rows)."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """The memory, traffic and FLOPs of one training step. All bytes are bytes per device.

  Attributes:
    config: the recipe.
    mesh: mesh axis -> size.
    platform: kind of the devices that the step was compiled for.
    seconds: time of compilation, in seconds.
    parameters: number of the model's parameters, adapters included, over all devices.
    trainable: number of the parameters that train.
    new: number of the parameters that the recipe's `new_weights` matches.
    parameter_bytes, optimizer_bytes, teacher_bytes, batch_bytes: bytes of the step's arguments: parameters, optimizer
      state, the teacher's parameters (0 without a teacher) and the batch.
    gradient_bytes: bytes of the gradients, computed from shapes. With microbatches there are two sets of gradients: the
      running sum, and those of the current microbatch.
    input_bytes: bytes of the inputs of all layers, the least that is kept for the backward pass; computed from shapes.
    memory: the compiler's own figures; None if the backend has none.
    traffic: kind of collective -> its traffic.
    flops_per_token: FLOPs per token of the forward and backward pass, plus those of the teacher's forward pass.
    rows: rows per device in a microbatch.
  """

  config: TrainConfig
  mesh: Mapping[str, int]
  platform: str
  seconds: float
  parameters: int
  trainable: int
  new: int
  parameter_bytes: int
  optimizer_bytes: int
  teacher_bytes: int
  batch_bytes: int
  gradient_bytes: int
  input_bytes: int
  memory: Memory | None
  traffic: Mapping[str, Traffic]
  flops_per_token: float
  rows: int

  @property
  def temporary_bytes(self) -> int | None:
    """Bytes per device at the peak beyond the step's arguments; None if the backend has no figures."""
    return None if self.memory is None else self.memory.peak - self.memory.arguments


def planned_model(config: TrainConfig, preset: str = "", mixer: str | None = None) -> ModelConfig:
  """Returns the config of the model that a recipe trains.

  The config is that of the argument `preset` if it is not empty; else that of `init_checkpoint` if this directory
  exists; else that of the recipe's own `preset`.

  Args:
    config: the recipe.
    preset: a name from `PRESETS`; empty: none.
    mixer: name of the mixer of all layers of a preset; None means supra.

  Raises:
    FileNotFoundError: `init_checkpoint` exists and is not a model directory.
    ValueError: a preset or the mixer is unknown, neither a preset nor an existing checkpoint is given, or there is a
      mixer for a checkpoint.
  """
  return _planned(config, "init_checkpoint", preset, mixer)


def planned_teacher(config: TrainConfig, preset: str = "") -> ModelConfig | None:
  """Returns the config of the recipe's teacher; None if the recipe has no `distill_from`.

  The config is found as in `planned_model`, with `distill_from` in place of `init_checkpoint`.

  Raises:
    FileNotFoundError, ValueError: as in `planned_model`.
  """
  return _planned(config, "distill_from", preset, "softmax") if config.distill_from else None


def _planned(config: TrainConfig, field: str, preset: str, mixer: str | None) -> ModelConfig:
  path = getattr(config, field)
  if not preset and path and place(path).exists():
    if mixer is not None and field == "init_checkpoint":
      raise ValueError(f"mixer={mixer!r} is for presets: the layers of {field}={path!r} have mixers of their own.")
    return load_model_without_params(path).config
  name = preset or config.preset
  if name not in PRESETS:
    raise ValueError(f"{field}={path!r} is not there, and preset={name!r} is none of {', '.join(PRESETS)}.")
  return PRESETS[name](mixer or "supra")


def planned_mesh(text: str) -> Mesh:
  """Makes a mesh of default devices if there are enough of them, else of as many CPU devices as the mesh needs.

  Must be called before anything else asks jax for devices, since it sets the number of CPU devices.

  Args:
    text: sizes of the mesh axes, such as `fsdp:4,tensor:2`.

  Raises:
    ValueError: an axis is unknown or named twice, or its size is not a positive integer.
  """
  count = math.prod(mesh_sizes(text).values())
  jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices()
  return make_mesh(text, (devices if len(devices) >= count else jax.devices("cpu"))[:count])


def plan(config: TrainConfig, model: ModelConfig, mesh: Mesh, teacher: ModelConfig | None = None) -> Plan:
  """Compiles the training step of a recipe for the devices of a mesh, and returns what the step takes.

  Nothing is allocated on the devices.

  Args:
    config: the recipe.
    model: config of the model that trains.
    mesh: device mesh to compile for; its devices need not be attached.
    teacher: config of the teacher; required if the recipe has `distill_from`.

  Raises:
    ValueError: the model or the batch cannot be cut over the mesh; the recipe's regexes do not fit the model; model and
      teacher do not fit each other, or the teacher is missing; or packed data that exist do not fit the recipe.
  """
  check_batch(config, mesh)
  rows = config.rows_a_microbatch
  shape = (config.microbatches, rows, config.data.sequence_length + 1)
  leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, leading=1))
  batch = dict.fromkeys(row_leaves(config.data, model.vocab_size), leaf)
  with jax.set_mesh(mesh):
    step = make_train_step(config, model, teacher)
    state = step.state_shapes(mesh)
    extra = () if step.teacher is None else (teacher_shapes(step.teacher, mesh),)
    began = time.monotonic()
    compiled = step.compiled(jax.tree.map(lambda x: x.sharding, state)).lower(state, batch, *extra).compile()
    seconds = time.monotonic() - began
  labelled = list(zip(jax.tree.leaves(state.params), jax.tree.leaves(step.labels), strict=True))
  trainable = [leaf for leaf, label in labelled if label.group != FROZEN]
  layer_input = config.data.sequence_length * model.hidden_size * jnp.dtype(config.dtype).itemsize
  return Plan(
    config=config,
    mesh=dict(mesh.shape),
    platform=mesh.devices.flat[0].device_kind,
    seconds=seconds,
    parameters=_count(state.params),
    trainable=_count(trainable),
    new=_count([leaf for leaf, label in labelled if label.new]),
    parameter_bytes=device_bytes(state.params),
    optimizer_bytes=device_bytes(state.opt_state),
    teacher_bytes=device_bytes(extra),
    batch_bytes=device_bytes(batch),
    gradient_bytes=device_bytes(trainable) * min(config.microbatches, 2),
    input_bytes=model.num_layers * rows // batch_shards(mesh) * layer_input // mesh.shape[TIME_AXIS],
    memory=memory(compiled),
    traffic=collectives(compiled.as_text()),
    flops_per_token=step_flops_per_token(model, config.data.sequence_length, teacher),
    rows=rows // batch_shards(mesh),
  )


def device_bytes(tree: Any) -> int:
  """Returns the bytes per device of a tree of arrays or `jax.ShapeDtypeStruct`s that have shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def render(plan: Plan, device_memory: int | None = None) -> str:
  """Returns the plan as a table in plain text.

  Args:
    plan: the plan.
    device_memory: memory of one device in bytes; the `verdict` then follows the table. None: no verdict.
  """
  config, tokens = plan.config, plan.config.tokens_a_step
  mesh = ",".join(f"{axis}:{size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
  rows = [
    ("mesh", mesh, f"compiled for {plan.platform} in {plan.seconds:.0f} s"),
    ("parameters", f"{plan.parameters:,}", f"{plan.trainable:,} train, {plan.new:,} are new"),
    ("tokens a step", f"{tokens:,}", f"{config.microbatches} x {plan.rows} rows a device"),
    ("steps", f"{config.num_steps:,}", f"{tokens * config.num_steps:,} tokens"),
    ("work a token", _of(plan.flops_per_token, "FLOP"), f"{_of(plan.flops_per_token * tokens, 'FLOP')} a step"),
    ("", "", ""),
    ("bytes a device", "", ""),
    ("  parameters", _of(plan.parameter_bytes), "float32"),
    ("  optimizer state", _of(plan.optimizer_bytes), ""),
    *([("  teacher", _of(plan.teacher_bytes), config.dtype)] if plan.teacher_bytes else []),
    ("  batch", _of(plan.batch_bytes), ""),
  ]
  if plan.memory is not None:
    known = f"gradients {_of(plan.gradient_bytes)}, inputs of layers {_of(plan.input_bytes)}, layers at work, logits"
    rows += [("  temporaries", _of(plan.temporary_bytes or 0), known), ("  peak", _of(plan.memory.peak), "")]
  if plan.traffic:
    rows += [("", "", ""), ("collectives a step", "", "bytes a device")]
  for kind, traffic in plan.traffic.items():
    sizes = ", ".join(f"{dtype} {_of(size)}" for dtype, size in traffic.bytes.items())
    rows.append((f"  {kind}", f"{traffic.count:,}", sizes + ("" if traffic.exact else ", not known exactly")))
  lines = [f"{name:20}{value:>16}  {remark}".rstrip() for name, value, remark in rows]
  if device_memory is not None:
    lines += ["", verdict(plan, device_memory)]
  return "\n".join(lines)


def verdict(plan: Plan, device_memory: int) -> str:
  """Returns a line that says whether the peak fits into `device_memory` bytes, by how much, and if not, what helps.

  If the backend has no memory figures, the line says that it is not known whether the step fits.
  """
  if plan.memory is None:
    return f"This backend does not tell its memory: whether it fits into {_of(device_memory)} is not known."
  spare = device_memory - plan.memory.peak
  if spare >= 0:
    return f"fits: {_of(spare)} of {_of(device_memory)} to spare."
  helps = []
  if plan.config.remat != "block":
    helps.append("remat=block keeps the inputs of layers only")
  if plan.rows > 1:
    most = plan.config.microbatches * plan.rows
    helps.append(f"microbatches up to {most}, with 1 row a device, shrink all of the temporaries but the gradients")
  fixed = plan.parameter_bytes + plan.optimizer_bytes + plan.teacher_bytes + plan.gradient_bytes
  what = "parameters, optimizer state and gradients" + (", and the teacher" if plan.teacher_bytes else "")
  helps.append(f"more devices on fsdp share the {_of(fixed)} of {what}")
  return f"does not fit: {_of(-spare)} more than {_of(device_memory)}. " + "; ".join(helps) + "."


def _of(number: float, unit: str = "B") -> str:
  """Formats an amount with two decimals and a decimal prefix: 39650000000 -> 39.65 GB."""
  for prefix in ("", "k", "M", "G", "T"):
    if number < 1000:
      return f"{number:.2f} {prefix}{unit}"
    number /= 1000
  return f"{number:,.2f} P{unit}"
