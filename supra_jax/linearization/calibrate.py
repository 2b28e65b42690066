"""Calibration: solves for projections by least squares, layer by layer, so that the RNN's layers match the teacher's.

Teacher and student read the same text. Let x_t and x_s be the residual streams that enter a layer of the teacher and of
the student, and a_s the inputs of the student's output projections (what `Mixer.outputs` returns, concatenated). The
feature maps phi keep their initial values. The student's W_o, and b_o if it has a bias, are the ridge regression of

  x_s + a_s W_o + b_o = x_t + softmax attention(x_t).

Let x_t' and x_s' be the residual streams after attention, and h_s the input of the last projection of the student's
MLP. The student's W_down, and b_down if it has a bias, are the ridge regression of

  x_s' + h_s W_down + b_down = x_t' + MLP(x_t').

The ridge keeps W_o near 0, and W_down near the teacher's. If a mixer has several output projections, the ridge keeps
each of them near its initial value: the teacher's W_o for the softmax attention of a window (the exact solution for a
window as long as the text), and 0 for the linear attention.

Each token has the weight 1 / mean square of the teacher's stream, since the norm that follows scales all tokens to the
same size. (Some tokens, the first of a text above all, have activations a thousand times those of others; without
weights, almost only these tokens would be fitted.) No gradient step is taken, and no parameter changes its shape.
Memory does not grow with the text: the streams are kept on disk and read one batch at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supra_jax.core.progress import Progress
from supra_jax.core.sharding import BATCH_AXES, constrain, least_tokens, put_batch
from supra_jax.data.loading import Batch
from supra_jax.linearization.solve import NOTHING, PRIOR_RIDGE, RIDGE, Moments, solve
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Dense, Norm, SwiGLU, at_least_float32
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer

# Called after each layer with (number of the layer, number of layers, the value measured, the value in words).
Report = Callable[[int, int, float, str], None]


@contextlib.contextmanager
def shown(*, enabled: bool = True) -> Iterator[Report]:
  """Yields a Report that shows a progress bar on stderr; the bar starts again whenever all layers are done.

  The first layer, before which programs are compiled, does not count in the time left.
  """
  describe = "Calibrating, {done} of {total}"  # layers, of each batch where batches are read one by one
  with Progress(0, describe, {"text": str}, enabled=enabled, desc="Calibrating", unit="layer") as progress:

    def report(layer: int, layers: int, value: float, text: str) -> None:
      is_first = progress.done == progress.total
      if is_first:
        progress.begin(layers, first=1)
      progress.advance_to(progress.done + (not is_first), text=text)

    yield report


def calibrate(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  student: tuple[Mapping[str, Any], ModelConfig],
  batches: Sequence[Batch],
  mesh: Mesh,
  *,
  ridge: float = RIDGE,
  mlp: bool = True,
  dtype: Any = jnp.float32,
  directory: Path | None = None,
  report: Report | None = None,
) -> dict[str, Any]:
  """Solves for the projections of every layer whose mixer differs from the teacher's, and returns the new parameters.

  Call this function under `jax.set_mesh(mesh)`.

  Args:
    teacher: (parameters, one subtree per layer, and config) of the softmax model.
    student: (parameters and config) of the model that `linearize` made of the teacher. A bias is solved for if an
      output projection has one.
    batches: this process's rows of each batch: "tokens" int32 [rows, T + 1], of which the first T are read, and
      "segment_ids" of the same shape if documents are kept apart.
    mesh: device mesh that parameters and batches are sharded over.
    ridge: strength of the preference for small weights, in tokens: it acts like that many further tokens whose features
      are noise of the same size and whose target is 0.
    mlp: whether to solve for the MLP's last projection too, which doubles the time.
    dtype: dtype of the computation; moments are float32, and their sums over batches float64.
    directory: directory in which to make a temporary directory for the streams, 3 * tokens * hidden_size numbers (4
      with windows); None: the system's directory for temporary files.
    report: called after each layer, up to the last that is solved for, with the share of the attention's energy that
      the solution misses; the share is 0 for layers that are not solved for.

  Returns:
    The student's parameters, one subtree per layer, in the dtypes that they had.

  Raises:
    ValueError: there are no batches, all mixers are the teacher's, or activations of an attention are not finite.
  """
  if not batches:
    raise ValueError("There are no batches to calibrate with.")
  if teacher[1].layers == student[1].layers:
    raise ValueError("There is no layer to calibrate: all mixers are the teacher's.")
  (teacher_params, teacher_config), (student_params, config) = teacher, student
  params = dict(student_params)
  run = _Run(teacher_config, config, jnp.dtype(dtype), mesh)
  mixers = list(zip(teacher_config.layers, config.layers, strict=True))
  last = max(i for i, (theirs, ours) in enumerate(mixers) if theirs != ours)
  with tempfile.TemporaryDirectory(dir=directory, prefix="calibration-") as spool:
    streams = _Streams(Path(spool), mesh)
    for number, batch in enumerate(batches):
      x = run.embed(params, run.put(batch))
      streams.write(number, teacher=x, student=x)
    for i, (theirs, ours) in enumerate(mixers[: last + 1]):
      name, missed = f"layers_{i}", 0.0
      if theirs != ours:
        kinds = (theirs, ours)
        params[name], missed = _calibrate_layer(
          run, streams, kinds, teacher_params[name], params[name], batches, ridge, mlp
        )
        if not math.isfinite(missed):
          raise ValueError(
            f"Layer {i} cannot be calibrated: the teacher's activations there are not finite. "
            "`supra_jax.bin.evaluate` on the teacher says from which token on."
          )
      else:
        for number, batch in enumerate(batches):
          before = streams.read(number, "teacher", "student")
          both = run.keep(ours, teacher_params[name], params[name], *before, run.put(batch))
          streams.write(number, teacher=both[0], student=both[1])
      if report is not None:
        report(i, last + 1, missed, f"attention of layer {i} missed by {missed:.0%}")
  return params


def _calibrate_layer(
  run: _Run,
  streams: _Streams,
  kinds: tuple[MixerConfig, MixerConfig],
  teacher: Any,
  student: Any,
  batches: Sequence[Batch],
  ridge: float,
  mlp: bool,
) -> tuple[dict[str, Any], float]:
  """Calibrates one layer and advances the streams past it.

  Returns:
    (the student's calibrated parameters of the layer, the share of the attention's energy that is missed).
  """
  total = NOTHING
  for number, batch in enumerate(batches):
    before = streams.read(number, "teacher", "student")
    target, features, moments = run.attend(kinds, teacher, student, *before, run.put(batch))
    streams.write(number, teacher=target, features=features)
    total = _add(total, moments)
  names = run.outputs(kinds[1], student)
  kernels = [student[MIXER][name]["kernel"] for name in names]
  widths = [len(kernel) for kernel in kernels]
  prior: Any = 0.0  # not the teacher's W_o, which is made for softmax attention
  ridges = [ridge]
  if len(names) > 1:
    ridges = [ridge * PRIOR_RIDGE if name in teacher[MIXER] else ridge for name in names]
    prior = np.vstack([_whole(kernel) for kernel in kernels])
  biased = next((name for name in names if "bias" in student[MIXER][name]), None)
  kernel, bias, missed = solve(total, ridge=ridges, widths=widths, bias=biased is not None, prior=prior)
  for name, rows in zip(names, np.split(kernel, np.cumsum(widths)[:-1]), strict=True):
    student = _replaced(student, MIXER, name, rows, bias if name == biased else None)

  total = NOTHING
  for number in range(len(batches)):
    before = streams.read(number, "teacher", "student", "features")
    if mlp:
      target, stream, moments = run.feed(kinds[1], teacher, student, *before)
      total = _add(total, moments)
    else:
      target, stream = run.leave(kinds[1], teacher, student, *before)
    streams.write(number, teacher=target, student=stream)
  if not mlp:
    return student, missed

  kernel, bias, missed_by_mlp = solve(total, ridge=ridge, bias=run.student.mlp_bias)
  if not math.isfinite(missed_by_mlp):
    return student, missed_by_mlp
  old = jax.tree.map(_whole, student["mlp"]["down_proj"])
  student = _replaced(student, "mlp", "down_proj", old["kernel"] + kernel, None if bias is None else old["bias"] + bias)
  for number in range(len(batches)):
    streams.write(number, student=run.finish(student, *streams.read(number, "student")))
  return student, missed


def _whole(x: jax.Array) -> np.ndarray:
  """Gathers a sharded parameter as a float64 numpy array on each host."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True), np.float64)


def _add(total: Moments, moments: Moments) -> Moments:
  return Moments(*(x + np.asarray(y.addressable_data(0), np.float64) for x, y in zip(total, moments, strict=True)))


def _replaced(
  layer: Mapping[str, Any], part: str, name: str, kernel: np.ndarray, bias: np.ndarray | None
) -> dict[str, Any]:
  """Returns the layer's parameters with one projection replaced; its dtype and sharding stay as they were."""
  old = layer[part][name]
  values = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
  new = {key: jax.device_put(x.astype(old[key].dtype), old[key].sharding) for key, x in values.items()}
  return {**layer, part: {**layer[part], name: new}}


class _Run:
  """The jitted functions that calibration runs on a layer; each is compiled once per kind of layer."""

  def __init__(self, teacher: ModelConfig, student: ModelConfig, dtype: Any, mesh: Mesh):
    self.teacher, self.student, self.dtype, self.mesh = teacher, student, dtype, mesh
    self._outputs: dict[MixerConfig, list[str]] = {}
    self.embed, self.attend = jax.jit(self._embed), jax.jit(self._attend, static_argnums=0)
    self.feed, self.finish = jax.jit(self._feed, static_argnums=0), jax.jit(self._finish)
    self.leave, self.keep = jax.jit(self._leave, static_argnums=0), jax.jit(self._keep, static_argnums=0)

  def put(self, batch: Batch) -> dict[str, jax.Array]:
    inputs = {name: x[:, :-1] for name, x in batch.items() if name in ("tokens", "segment_ids")}
    return jax.tree.map(lambda x: x[0], put_batch(inputs, self.mesh))

  def _context(self, batch):
    return Transformer(self.student).place(batch["tokens"], segment_ids=batch.get("segment_ids"))[0]

  def _norm(self, layer, name, x_BTD):
    return Norm(self.student.norm, self.student.norm_eps, self.dtype).apply({"params": layer[name]}, x_BTD)

  def _embed(self, params, batch):
    return Transformer(self.student, self.dtype).apply({"params": params}, batch["tokens"], method="embed")

  def outputs(self, kind: MixerConfig, student: Any) -> list[str]:
    """Returns the names of the layer's output projections, `o_proj`, which the teacher has too, first."""
    if kind not in self._outputs:
      x_BTD = jnp.zeros((*least_tokens().shape, self.student.hidden_size), self.dtype)
      batch = {"tokens": least_tokens()}
      found = jax.eval_shape(lambda layer: self._mix(kind, layer, x_BTD, self._context(batch)), student)
      self._outputs[kind] = sorted(found, key=lambda name: (name != "o_proj", name))
    return self._outputs[kind]

  def _mix(self, kind, student, x_BTD, context):
    mixer = mixer_class(kind.mixer)(self.student, kind, self.dtype)
    normed = self._norm(student, "input_layernorm", x_BTD)
    outs: Any = mixer.apply({"params": student[MIXER]}, normed, None, context, method="outputs")
    return outs[0]

  def _attend(self, kinds, teacher, student, x_teacher, x_student, batch):
    """Returns (x_t + softmax attention(x_t) [B, T, D], the student's features a_s [B, T, F], moments for W_o)."""
    context = self._context(batch)
    attend = functools.partial(Block(self.teacher, kinds[0], self.dtype).apply, method="attend")
    attended, _ = attend({"params": teacher}, x_teacher, None, context)
    target = x_teacher + attended
    outs = self._mix(kinds[1], student, x_student, context)
    features = jnp.concatenate([outs[name] for name in self.outputs(kinds[1], student)], axis=-1)
    missing = at_least_float32(target) - at_least_float32(x_student)
    return target, features, _moments(features, missing, self._weights(target))

  def _feed(self, kind, teacher, student, target, x_student, features):
    """Returns (the teacher's stream after its MLP, the student's stream before its MLP, moments for W_down)."""
    x_student = self._attended(kind, student, x_student, features)
    target = self._mlp(self.teacher, teacher, target)
    normed = self._norm(student, "post_attention_layernorm", x_student)
    hidden: Any = SwiGLU(self.student, self.dtype).apply({"params": student["mlp"]}, normed, method="hidden")
    missing = at_least_float32(target) - at_least_float32(self._mlp(self.student, student, x_student))
    return target, x_student, _moments(hidden, missing, self._weights(target))

  def _finish(self, student, x_student):
    return self._mlp(self.student, student, x_student)

  def _leave(self, kind, teacher, student, target, x_student, features):
    """Returns the streams (teacher's, student's) after a layer whose MLP is not solved for."""
    x_student = self._attended(kind, student, x_student, features)
    return self._mlp(self.teacher, teacher, target), self._mlp(self.student, student, x_student)

  def _attended(self, kind, student, x_student, features):
    end = 0
    for name in self.outputs(kind, student):
      params = student[MIXER][name]
      begin, end = end, end + len(params["kernel"])
      part = features[..., begin:end]
      x_student += Dense(self.student.hidden_size, "bias" in params, self.dtype).apply({"params": params}, part)
    return x_student

  def _weights(self, stream):
    """Returns the square root of each token's weight, [B, T, 1]: the factor by which the next norm scales the token."""
    stream = at_least_float32(stream)
    return jax.lax.rsqrt(jnp.mean(stream * stream, axis=-1, keepdims=True) + self.student.norm_eps)

  def _mlp(self, config, layer, x_BTD):
    return Block(config, config.layers[0], self.dtype).apply({"params": layer}, x_BTD, method="feed")

  def _keep(self, kind, teacher, student, x_teacher, x_student, batch):
    """Returns the streams (teacher's, student's) after a layer whose mixer is the teacher's."""
    context = self._context(batch)
    blocks = ((self.teacher, teacher, x_teacher), (self.student, student, x_student))
    return [Block(c, kind, self.dtype).apply({"params": p}, x, None, context)[0] for c, p, x in blocks]


def _moments(features_BTF: jax.Array, y_BTD: jax.Array, weights_BT1: jax.Array) -> Moments:
  weights = weights_BT1.reshape(-1, 1)
  a = at_least_float32(features_BTF).reshape(-1, features_BTF.shape[-1])
  a = jnp.concatenate([a, jnp.ones((len(a), 1), a.dtype)], axis=1) * weights
  y = y_BTD.reshape(-1, y_BTD.shape[-1]) * weights
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  moments = Moments(product(a.T, a), product(a.T, y), jnp.sum(y * y), jnp.float32(len(a)))
  return jax.tree.map(constrain, moments)  # summed over devices, and whole on each


class _Streams:
  """Keeps this process's activations [rows, T, width] on disk, one file per name and batch."""

  def __init__(self, directory: Path, mesh: Mesh):
    self._directory, self._mesh, self._spec = directory, mesh, PartitionSpec(BATCH_AXES)
    self._kinds: dict[str, tuple[tuple[int, ...], np.dtype]] = {}

  def write(self, number: int, **streams: jax.Array) -> None:
    for name, x in streams.items():
      local = x if jax.process_count() == 1 else self._own_rows(x)
      array = np.asarray(local)
      self._kinds[name] = array.shape, array.dtype
      array.tofile(self._file(name, number))

  def read(self, number: int, *names: str) -> list[jax.Array]:
    return [self._read(name, number) for name in names]

  def _read(self, name: str, number: int) -> jax.Array:
    shape, dtype = self._kinds[name]
    array = np.fromfile(self._file(name, number), dtype).reshape(shape)
    return jax.make_array_from_process_local_data(NamedSharding(self._mesh, self._spec), array)

  def _own_rows(self, x: jax.Array) -> jax.Array:
    return multihost_utils.global_array_to_host_local_array(x, self._mesh, self._spec)

  def _file(self, name: str, number: int) -> Path:
    return self._directory / f"{name}-{number}"
