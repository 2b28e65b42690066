"""What a recipe will take, before there are weights or devices: its step is compiled, and the compiler is asked."""

from __future__ import annotations

import dataclasses
import math
import re
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

_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}

# Mistral-7B on fsdp:8, its temporaries on CPU, H100 and TPU v5p in GB: 16.0, 12.8 and 17.8 with 2 rows a device in each
# of two microbatches, 46.5 and 28.4 on CPU and H100 with 16.
CPU_NOTE = """\
Compiled for CPU devices: temporaries of an accelerator's compiler will differ. XLA's CPU backend widens bfloat16 to
float32 in products and collectives, so that weights and activations move twice their bytes, and it sums gradients by
all-reduce where others use reduce-scatter. 7B models took from 0.6 (16 rows a device) to 0.8 (2 rows) of these
temporaries compiled for H100s, and 1.1 for TPU v5p (2 rows)."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step takes. Bytes are those of one device.

  Attributes:
    mesh: sizes of its axes.
    platform: what it was compiled for.
    seconds: of compilation.
    parameters, trainable, new: how many there are, train, and are not the teacher's.
    parameter_bytes, optimizer_bytes, teacher_bytes, batch_bytes: of what a step is given.
    gradient_bytes: worked out: two sets of them where there are microbatches, the sum and what is added to it.
    input_bytes: worked out: what each layer keeps for the backward pass at least, its input.
    memory: the compiler's own figures; None where it has none.
    traffic: by kind of collective.
    flops_per_token: of forward and backward pass, and the teacher's forward pass.
    rows: of a device's microbatch.
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
    """All that lives during a step only."""
    return None if self.memory is None else self.memory.peak - self.memory.arguments


def planned_model(config: TrainConfig, preset: str = "", mixer: str = "supra") -> ModelConfig:
  """The model that a recipe trains: the preset that is named here, else init_checkpoint's, else the recipe's preset.

  Args:
    config: the recipe.
    preset: one of `PRESETS`, before all else.
    mixer: mixer of a preset's layers.

  Raises:
    ValueError: a preset is unknown, or there is nothing to go by.
  """
  return _planned(config, "init_checkpoint", preset, mixer)


def planned_teacher(config: TrainConfig, preset: str = "") -> ModelConfig | None:
  """The transformer that a recipe distils from, found as `planned_model` finds the model; None where there is none."""
  return _planned(config, "distill_from", preset, "softmax") if config.distill_from else None


def _planned(config: TrainConfig, field: str, preset: str, mixer: str) -> ModelConfig:
  path = getattr(config, field)
  if not preset and path and place(path).exists():
    return load_model_without_params(path).config
  name = preset or config.preset
  if name not in PRESETS:
    raise ValueError(f"{field}={path!r} is not there, and preset={name!r} is none of {', '.join(PRESETS)}.")
  return PRESETS[name](mixer)


def planned_mesh(text: str) -> Mesh:
  """A mesh over accelerators where there are enough of them, else over CPU devices, as many as it takes.

  To be called before anything else asks jax for devices.
  """
  count = math.prod(mesh_sizes(text).values())
  jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices()
  return make_mesh(text, (devices if len(devices) >= count else jax.devices("cpu"))[:count])


def plan(config: TrainConfig, model: ModelConfig, mesh: Mesh, teacher: ModelConfig | None = None) -> Plan:
  """Compiles the step of a recipe for the devices of a mesh; allocates nothing on them.

  Args:
    config: the recipe.
    model: that trains.
    mesh: its devices need not be here.
    teacher: where the recipe distils.

  Raises:
    ValueError: the model or the batch cannot be cut over the mesh; or packed data that exist do not fit the recipe.
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
  """Bytes of a tree of sharded shapes on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def parse_bytes(text: str) -> int:
  """`80GB` -> 80,000,000,000.

  Raises:
    ValueError: it is no number with one of the units GB, GiB, MB and MiB.
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]i?B)", text)
  if not found:
    raise ValueError(f"{text!r}: wanted a number and one of {', '.join(_UNITS)}, as in 80GB.")
  return round(float(found[1]) * _UNITS[found[2]])


def render(plan: Plan, device_memory: int | None = None) -> str:
  """The plan as a table, and whether it fits."""
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
  """Whether the peak fits into a device, by how much, and what would help where it does not."""
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
  """39650000000 -> 39.65 GB."""
  for prefix in ("", "k", "M", "G", "T"):
    if number < 1000:
      return f"{number:.2f} {prefix}{unit}"
    number /= 1000
  return f"{number:,.2f} P{unit}"
