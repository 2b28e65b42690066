"""Tries the implementations on this device: whether each is right, forward and gradients, and how fast it is.

`examine` tries one implementation, `examine_apart` all, each in a process of its own, since a compiler may crash. Both
yield JSON values, of which `judgement` makes a verdict and a table.
"""

import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import device, truth, verdict
from kernels_pallas.api import FALLBACK, IMPLEMENTATIONS, REFUSALS, linear_attention

DTYPES = ("bfloat16", "float32")
WIDTHS = (64, 128, 256)
MODES = ("forward", "forward+backward")
CELL_SECONDS = 180.0  # longest time between two results of a process, compilation included
_ROUND = 0.02  # seconds of the calls that are timed together
_ROUNDS = 5
_REPEATS_BELOW = 0.5  # a call that takes longer, in seconds, is timed once


class Size(NamedTuple):
  """A size at which the op is timed: rows, tokens per row, and heads of q, k and v."""

  rows: int
  tokens: int
  heads: int


# On a GPU the kernels cut the last one into parts along time, and the middle one not.
SIZES = (Size(4, 256, 16), Size(16, 2048, 16), Size(1, 16384, 16))
SIZES_ON_CPU = (Size(1, 256, 8), Size(1, 1024, 8), Size(1, 4096, 8))
INTERPRETED = Size(1, 1024, 2)  # at which an interpreted kernel is compared with FALLBACK


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
  long_sizes = () if not is_kernel else (INTERPRETED,) if platform == "cpu" else sizes
  for dtype, width in cells_of(name, platform)[first:]:
    what = {"implementation": name, "dtype": dtype, "width": width}
    yield what
    operand = jax.ShapeDtypeStruct((1, 64, 1, width), jnp.dtype(dtype))
    if refusal := REFUSALS[name](operand, operand, operand) if is_kernel else None:
      yield {**what, "refused": refusal}
      continue
    try:
      yield {**what, "errors": errors(name, dtype, width)}
      # The small case is a chunk or two; a kernel's loop and its parts are what may break on long rows.
      for size in long_sizes:
        yield {**what, "tokens": size.tokens, "long_errors": long_errors(name, dtype, width, size)}
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
  return {what: _error(found[what], wanted[what], axis=1 if "state" in what else 2) for what in wanted}


def _error(found: Any, wanted: Any, axis: int) -> float | None:
  """Returns the largest ||found - wanted|| / ||wanted|| over the heads, which are an axis; None if it is not finite."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  norms = [np.sqrt((np.moveaxis(x, axis, 0) ** 2).reshape(x.shape[axis], -1).sum(1)) for x in (found - wanted, wanted)]
  largest = float(np.max(norms[0] / norms[1]))
  return largest if np.isfinite(largest) else None


def long_errors(name: str, dtype: str, width: int, size: Size) -> dict[str, float | None]:
  """Returns {result or gradient: error}, like `errors`, beside FALLBACK at a size that is timed."""
  inputs = _draw(dtype, width, size)
  # An interpreted kernel is cut as for a GPU so small that each part has several chunks.
  with jax.default_matmul_precision("highest"), device.assuming(device.Gpu(90, 4)):
    found, wanted = (jax.jit(_both(named(which), width, size))(*inputs) for which in (name, FALLBACK))
  pairs = zip(("output", "d_q", "d_k", "d_v"), jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  return {what: _error(x, y, axis=2) for what, x, y in pairs}


def _draw(dtype: str, width: int, size: Size) -> tuple[jax.Array, ...]:
  """Returns q, k and v as features are, and the cotangent of the output, drawn on the device."""
  shape = (size.rows, size.tokens, size.heads, width)

  @jax.jit
  def draw(key):
    q, k, v, d_output = (jax.random.normal(key, shape) for key in jax.random.split(key, 4))
    return tuple(x.astype(dtype) for x in (jax.nn.relu(q), jax.nn.relu(k), v, d_output))

  return jax.block_until_ready(draw(jax.random.key(0)))


def _both(op: Callable, width: int, size: Size) -> Callable:
  """Returns the function (q, k, v, cotangent) -> (output, gradients)."""
  slopes = jnp.asarray(2.0 ** -np.linspace(1, 8, size.heads), jnp.float32)

  def both(q, k, v, d_output):
    output, pullback = jax.vjp(lambda *x: op(*x, slopes, scale=width**-0.5)[0], q, k, v)
    return output, pullback(d_output)

  return both


def time_op(name: str, dtype: str, width: int, size: Size, modes: Sequence[str] = MODES) -> dict[str, float]:
  """Returns {mode: median seconds of a call}, for modes of MODES."""
  inputs, both = _draw(dtype, width, size), jax.jit(_both(named(name), width, size))
  # What is not returned is not computed.
  calls = dict(zip(MODES, (jax.jit(lambda *x: _both(named(name), width, size)(*x)[0]), both), strict=True))
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


def examine_apart(cell_seconds: float = CELL_SECONDS) -> Iterator[dict[str, Any]]:
  """Tries all implementations that there are for this device, each in a process of its own.

  A process that ends early, or says nothing for `cell_seconds`, has failed at the cell that it was at; another one goes
  on behind that. The caller's process must not use a device, since not all kinds can be shared.

  Yields:
    What `described` returns; then what `examine` yields.

  Raises:
    OSError: no process can use the device; the message is what the process said.
  """
  about: dict[str, Any] | None = None
  names = [FALLBACK]
  while names:
    name, begun, complete, retried = names.pop(0), 0, False, False
    while not complete:
      cell: dict[str, Any] = {}
      failed = False
      with _Process(name, begun, cell_seconds) as process:
        for record in process.records():
          if "platform" in record:
            if about is None:
              about = record
              names += names_for(about["platform"])[1:]
              yield about
          elif "complete" in record:
            complete = True
          else:
            if record.keys() == {"implementation", "dtype", "width"}:
              cell, begun, failed = record, begun + 1, False
            failed |= "failed" in record
            yield record
        status, said = process.ended()
      if about is None:
        raise OSError(f"The device cannot be used: {_reason(said)}")
      if complete:
        break
      if not cell and not retried:
        retried = True
        time.sleep(3)  # the process before it may still hold the device
        continue
      cells = cells_of(name, about["platform"])
      if not cell:
        dtype, width = cells[begun]
        cell, begun = {"implementation": name, "dtype": dtype, "width": width}, begun + 1
        yield cell
      if not failed:
        why = f"no answer for {cell_seconds:.0f} s" if process.timed_out else f"its process ended with status {status}"
        yield {**cell, "failed": f"{why}: {_reason(said)}", "said": said[-3000:]}
      complete = begun == len(cells)


class _Process:
  """A process of this module, which tries the cells of an implementation from one on."""

  def __init__(self, name: str, first: int, seconds: float):
    self._command = [sys.executable, "-m", "kernels_pallas.checkup", name, str(first)]
    self._seconds = seconds
    self.timed_out = False

  def __enter__(self) -> "_Process":
    # The memory of the process before this one may not be free yet: take no more than is needed.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    self._said = tempfile.TemporaryFile("w+")
    self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment)
    return self

  def __exit__(self, *_: object) -> None:
    self._child.kill()  # where the caller stops early
    self._child.wait()
    self._said.close()

  def records(self) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects that the process prints; kills it if there is none for too long."""
    assert self._child.stdout is not None
    timer = self._timer()
    for line in self._child.stdout:
      timer.cancel()
      if line.startswith("{"):
        yield json.loads(line)
      timer = self._timer()
    timer.cancel()

  def _timer(self) -> threading.Timer:
    timer = threading.Timer(self._seconds, self._kill)
    timer.daemon = True
    timer.start()
    return timer

  def _kill(self) -> None:
    self.timed_out = True
    self._child.kill()

  def ended(self) -> tuple[int, str]:
    """Waits for the end; returns (exit status, what was printed on stderr)."""
    status = self._child.wait()
    self._said.seek(0)
    return status, self._said.read().strip()


def _reason(said: str) -> str:
  """Returns the line of a process' stderr that tells the most."""
  lines = said.splitlines() or ["it said nothing"]
  return next((line for line in lines if re.match(r"F\d{4} |.*(Check failed|\w+Error:|Fatal)", line)), lines[-1])


if __name__ == "__main__":
  # python -m kernels_pallas.checkup NAME FIRST, for `examine_apart`.
  print(json.dumps(described(), allow_nan=False), flush=True)
  for result in examine(sys.argv[1], first=int(sys.argv[2])):
    print(json.dumps(result, allow_nan=False), flush=True)
    if "failed" in result:
      os._exit(3)  # an error on the device may leave it of no use to this process
  print(json.dumps({"complete": True}, allow_nan=False), flush=True)
