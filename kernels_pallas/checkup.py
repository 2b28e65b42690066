"""Tries the implementations on this device: whether each is right, forward and gradients, and how fast it is.

`examine` tries one implementation, `examine_apart` all, each in a process of its own, since a compiler may crash. Both
yield JSON values, of which `judgement` makes a verdict and a table.
"""

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import truth, verdict
from kernels_pallas.api import FALLBACK, IMPLEMENTATIONS, REFUSALS, linear_attention

DTYPES = ("bfloat16", "float32")
WIDTHS = (64, 128, 256)
MODES = ("forward", "forward+backward")
_ROUND = 0.02  # seconds of the calls that are timed together
_ROUNDS = 5
_REPEATS_BELOW = 0.5  # a call that takes longer, in seconds, is timed once


class Size(NamedTuple):
  """A size at which the op is timed: rows, tokens per row, and heads of q, k and v."""

  rows: int
  tokens: int
  heads: int


SIZES = (Size(4, 256, 16), Size(4, 2048, 16), Size(1, 16384, 16))
SIZES_ON_CPU = (Size(1, 256, 8), Size(1, 1024, 8), Size(1, 4096, 8))


def rounded(case: truth.Case, dtype: Any) -> truth.Case:
  """Returns the case with q, k and v rounded to a dtype, in float32."""
  return {name: np.asarray(jnp.asarray(x, dtype), np.float32) if name in "qkv" else x for name, x in case.items()}


def operands(case: truth.Case, dtype: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns the differentiable operands of a case, q, k and v in a dtype, and the others but the slopes."""
  differentiable = {name: jnp.asarray(case[name], dtype) for name in "qkv"}
  if "initial_state" in case:
    differentiable["initial_state"] = jnp.asarray(case["initial_state"], jnp.promote_types(dtype, jnp.float32))
  return differentiable, {name: jnp.asarray(case[name]) for name in ("segment_ids", "lengths") if name in case}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(op: Callable, differentiable, slopes, options, d_output, d_state):
  """Returns (output, state, gradients of the differentiable operands) for given cotangents of output and state."""

  def call(x):
    return op(x["q"], x["k"], x["v"], slopes, scale=truth.SCALE, initial_state=x.get("initial_state"), **options)

  (output, state), pullback = jax.vjp(call, differentiable)
  return output, state, pullback((d_output.astype(output.dtype), d_state.astype(state.dtype)))[0]


def run(op: Callable, case: truth.Case, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """Computes with an op, which has the signature of `linear_attention`, what `truth.by_loop` returns for a case."""
  differentiable, options = operands(case, dtype)
  slopes = jnp.asarray(case["slopes"])
  output, state, gradients = value_and_gradients(op, differentiable, slopes, options, *truth.cotangents(case))
  return {"output": output, "state": state} | {f"d_{name}": x for name, x in gradients.items()}


def named(implementation: str) -> Callable:
  """Returns `linear_attention` with an implementation of this name."""
  return functools.partial(linear_attention, implementation=implementation)


def names_for(platform: str) -> tuple[str, ...]:
  """Returns the implementations to examine on a platform, as `verdict.device` names it: FALLBACK, then the kernels.

  On a CPU all of them.
  """
  kernels = [row.implementation for row in verdict.CANDIDATES if row.platform == platform]
  return tuple(dict.fromkeys([FALLBACK, *(IMPLEMENTATIONS if platform == "cpu" else kernels)]))


def cells_of(name: str, platform: str) -> list[tuple[str, int]]:
  """Returns (dtype, width) of all cells that `examine` tries of an implementation on a platform."""
  if name not in REFUSALS:
    return list(itertools.product(DTYPES, WIDTHS))
  rows = [row for row in verdict.CANDIDATES if row.implementation == name]
  cells = [(row.dtype, width) for row in rows for width in WIDTHS if row.widths[0] <= width <= row.widths[1]]
  return [cell for cell in cells if platform != "cpu" or cell[1] == WIDTHS[0]]


def examine(name: str, *, first: int = 0, sizes: Sequence[Size] | None = None) -> Iterator[dict[str, Any]]:
  """Tries an implementation on this device.

  A check compares output, final state and all gradients with `truth.by_loop`, on a small case that has documents,
  padding, an initial state and grouped heads. FALLBACK and kernels are timed too: the forward pass with all gradients,
  and at the middle size the forward pass alone. On a CPU kernels are interpreted: they are not timed, and checked at
  one width.

  Args:
    name: a key of `IMPLEMENTATIONS`.
    first: number of the cells, of `cells_of`, to pass over.
    sizes: sizes to time; None means SIZES, or SIZES_ON_CPU.

  Yields:
    JSON values, each as soon as it is known: {"implementation", "dtype", "width"}, for the start of a cell alone, then
    with one of "refused": why it cannot serve here; "failed": the error that it raised; "errors": what `errors`
    returns; "tokens" and "seconds": what `time_op` returns.
  """
  _, platform = verdict.device()
  if sizes is None:
    sizes = SIZES_ON_CPU if platform == "cpu" else SIZES
  is_kernel = name in REFUSALS
  timed = name == FALLBACK or (is_kernel and platform != "cpu")
  for dtype, width in cells_of(name, platform)[first:]:
    what = {"implementation": name, "dtype": dtype, "width": width}
    yield what
    operand = jax.ShapeDtypeStruct((1, 64, 1, width), jnp.dtype(dtype))
    if refusal := REFUSALS[name](operand, operand, operand) if is_kernel else None:
      yield {**what, "refused": refusal}
      continue
    try:
      yield {**what, "errors": errors(name, dtype, width)}
      for size in sizes if timed and (platform != "cpu" or width == WIDTHS[0]) else ():
        modes = MODES if size == sizes[len(sizes) // 2] else MODES[1:]
        yield {**what, "tokens": size.tokens, "seconds": time_op(name, dtype, width, size, modes)}
    except Exception as error:  # compilers raise many types
      yield {**what, "failed": (str(error).strip() or repr(error)).splitlines()[0]}


def errors(name: str, dtype: str, width: int) -> dict[str, float | None]:
  """Returns {result or gradient: error} of an implementation on a small case; None where it is not finite.

  An error is the largest over heads of ||found - wanted|| / ||wanted||: over all heads together, and by the largest
  number, a decay that is wrong by two percent would pass for rounding to bfloat16.
  """
  case = rounded(truth.make_case(150, 2, 1, heads=4, key_width=width, value_width=width), dtype)
  # Otherwise accelerators round float32 operands to fewer bits.
  with jax.default_matmul_precision("highest"):
    found, wanted = run(named(name), case, jnp.dtype(dtype)), truth.by_loop(case)

  def error(what: str) -> float | None:
    axis = 1 if "state" in what else 2
    off, size = np.asarray(found[what], np.float64) - wanted[what], wanted[what]
    norms = [np.sqrt((np.moveaxis(x, axis, 0) ** 2).reshape(x.shape[axis], -1).sum(1)) for x in (off, size)]
    largest = float(np.max(norms[0] / norms[1]))
    return largest if np.isfinite(largest) else None

  return {what: error(what) for what in wanted}


def time_op(name: str, dtype: str, width: int, size: Size, modes: Sequence[str] = MODES) -> dict[str, float]:
  """Returns {mode: median seconds of a call}, for modes of MODES."""
  op, shape = named(name), (size.rows, size.tokens, size.heads, width)
  slopes = jnp.asarray(2.0 ** -np.linspace(1, 8, size.heads), jnp.float32)

  @jax.jit
  def draw(key):
    q, k, v, d_output = (jax.random.normal(key, shape) for key in jax.random.split(key, 4))
    return tuple(x.astype(dtype) for x in (jax.nn.relu(q), jax.nn.relu(k), v, d_output))

  @jax.jit
  def forward(q, k, v, d_output):
    return op(q, k, v, slopes, scale=width**-0.5)[0]

  @jax.jit
  def both(q, k, v, d_output):
    output, pullback = jax.vjp(lambda *x: op(*x, slopes, scale=width**-0.5)[0], q, k, v)
    return output, pullback(d_output)

  inputs = jax.block_until_ready(draw(jax.random.key(0)))
  calls = dict(zip(MODES, (forward, both), strict=True))
  return {mode: _seconds(calls[mode], inputs) for mode in modes}


def _seconds(call: Callable, inputs: tuple) -> float:
  def of_calls(count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
      result = call(*inputs)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / count

  jax.block_until_ready(call(*inputs))
  once = of_calls(1)
  if once > _REPEATS_BELOW:
    return once
  return statistics.median(of_calls(max(1, round(_ROUND / once))) for _ in range(_ROUNDS))


def described() -> dict[str, Any]:
  """Returns JSON values that describe this process' devices: kind, platform, number, bytes of memory, driver."""
  first = jax.devices()[0]
  kind, platform = verdict.device()
  memory = (first.memory_stats() or {}).get("bytes_limit") if platform != "cpu" else None
  driver = first.client.platform_version.replace("\n", ", ")
  return {"device": kind, "platform": platform, "devices": jax.device_count(), "memory": memory, "driver": driver}


def examine_apart() -> Iterator[dict[str, Any]]:
  """Tries all implementations that there are for this device, each in a process of its own.

  A process that ends early has failed at the cell that it was at; another one goes on behind that. The caller's process
  must not use a device, since not all kinds can be shared.

  Yields:
    What `described` returns; then what `examine` yields.

  Raises:
    OSError: no process can use the device; the message is the last line of what it said.
  """
  about: dict[str, Any] | None = None
  names = [FALLBACK]
  while names:
    name, begun, status = names.pop(0), 0, 1
    while status:
      cell: dict[str, Any] = {}
      with _process(name, begun) as (records, ended):
        for record in records:
          if "implementation" not in record:
            if about is None:
              about = record
              names += names_for(about["platform"])[1:]
              yield about
            continue
          if record.keys() == {"implementation", "dtype", "width"}:
            cell, begun = record, begun + 1
          yield record
        status, said = ended()
      if status and not cell:
        raise OSError(f"The device cannot be used: {said}")
      if status:
        yield {**cell, "failed": f"its process ended with status {status}: {said}"}


@contextlib.contextmanager
def _process(name: str, first: int) -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[], tuple[int, str]]]]:
  """Yields what a process of this module prints, and a function that waits for (exit status, last line on stderr)."""
  command = [sys.executable, "-m", "kernels_pallas.checkup", name, str(first)]
  # The memory of the process before this one may not be free yet: take no more than is needed.
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
  with (
    tempfile.TemporaryFile("w+") as errors,
    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
  ):

    def ended() -> tuple[int, str]:
      status = child.wait()
      errors.seek(0)
      return status, (errors.read().strip().splitlines() or ["it said nothing"])[-1]

    assert child.stdout is not None
    try:
      yield (json.loads(line) for line in child.stdout if line.startswith("{")), ended
    finally:
      child.kill()  # where the caller stops early


if __name__ == "__main__":
  # python -m kernels_pallas.checkup NAME FIRST, for `examine_apart`.
  print(json.dumps(described(), allow_nan=False), flush=True)
  for result in examine(sys.argv[1], first=int(sys.argv[2])):
    print(json.dumps(result, allow_nan=False), flush=True)
