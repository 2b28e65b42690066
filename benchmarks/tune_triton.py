"""Searches for the fastest block sizes (forms) of the Triton kernels on this GPU, for `kernels_pallas.triton.FORMS`.

    python -m benchmarks.tune_triton [--shapes=8x2048x32x128,1x32768x32x128] [--dtypes=bfloat16,float32] [--budget=0.2]

For each shape, B x T x heads x width, and dtype, every form that compiles runs forward + backward. The table has the
fastest forms, with medians of wall-clock time, and the form that the library uses now. A form whose results differ from
those of `chunked_xla` is reported and left out: compilers have been wrong at some block sizes. Put the first row of a
table into FORMS if it wins by more than the spread.

With --output the tables go into DIR/tune_triton_<device>.json too.

On a machine without a GPU the kernels are interpreted, which shows that the search works and tells nothing about time:
`--shapes=1x64x1x16`.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.machine import described
from kernels_pallas import device, linear_attention, triton
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json

_SHAPES = flags.DEFINE_list(
  "shapes", ["8x2048x32x128", "1x32768x32x128", "8x2048x32x64", "4x2048x16x256"], "BxTxHxD: rows, tokens, heads, width."
)
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16"], "Dtypes of q, k and v.")
_BUDGET = flags.DEFINE_float("budget", 0.2, "Seconds to time a form for; at least five runs.")
_SECONDS = flags.DEFINE_float("seconds", math.inf, "Time to search for; forms that are not reached are left out.")
_OUTPUT = flags.DEFINE_string("output", "", "Directory of a JSON; empty: none.")
_SHOWN = flags.DEFINE_integer("shown", 5, "Fastest forms to show in a table.")

CHUNKS, TILES, BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
MIN_RUNS, MAX_RUNS = 5, 200
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}


def forms(width: int) -> Iterator[triton.Form]:
  """Yields all forms whose tiles and blocks are no larger than the width of a head."""
  for form in itertools.starmap(triton.Form, itertools.product(CHUNKS, TILES, BLOCKS, WARPS, STAGES)):
    if form.key_tile <= max(width, TILES[0]) and form.block <= max(width, BLOCKS[0]):
      yield form


def make_step(shape: tuple[int, ...], dtype: str, implementation: str):
  """Makes a function of no arguments that returns output and gradients, compiled with the current `choose_form`."""
  batch, tokens, heads, width = shape
  rng = np.random.default_rng(0)
  q, k, v, d_output = (jnp.asarray(rng.standard_normal((batch, tokens, heads, width)), dtype) for _ in range(4))
  slopes = jnp.asarray(2.0 ** -np.linspace(0.5, 8, heads), jnp.float32)

  @jax.jit
  def step(q, k, v, d_output):
    def op(q, k, v):
      return linear_attention(q, k, v, slopes, scale=width**-0.5, implementation=implementation)[0]

    output, pullback = jax.vjp(op, jax.nn.relu(q), jax.nn.relu(k), v)
    return output, pullback(d_output)

  return lambda: jax.block_until_ready(step(q, k, v, d_output))


def median_seconds(step) -> float:
  """Median wall-clock time of a step."""
  times: list[float] = []
  while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and sum(times) < _BUDGET.value):
    began = time.perf_counter()
    step()
    times.append(time.perf_counter() - began)
  return statistics.median(times)


def is_close(results, expected, tolerance: float) -> bool:
  """Whether no array differs from the expected one by more than `tolerance` times its largest value."""
  pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
  difference = [jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y)) for x, y in pairs]
  return all(float(x) <= tolerance for x in difference)


def search(shape: tuple[int, ...], dtype: str, end: float) -> dict[str, Any]:
  """Times all forms for a shape (B, T, heads, width) until the clock is at `end`, prints the table, and returns it."""
  known = triton.choose_form(device.gpu().capability, jnp.dtype(dtype), shape[3])
  expected = jax.tree.map(lambda x: x.astype(jnp.float32), make_step(shape, dtype, "chunked_xla")())
  times: dict[triton.Form, float] = {}
  every = sorted(forms(shape[3]), key=lambda form: form != known)
  # In an order of its own, so that a search that ends early has tried forms of all kinds.
  every[1:] = random.Random(0).sample(every[1:], len(every) - 1)
  for number, form in enumerate(every):
    if time.perf_counter() > end:
      print(f"  {number} of {len(every)} forms were reached.")
      break
    triton.choose_form = lambda *_, form=form: form
    jax.clear_caches()
    step = make_step(shape, dtype, "triton")
    try:
      results = step()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
      print(f"  {form}: {str(error).splitlines()[0][:100]}")
      continue
    if is_close(results, expected, TOLERANCE[dtype]):
      times[form] = median_seconds(step)
    else:
      print(f"  {form}: WRONG RESULTS")
  print(f"| {'x'.join(map(str, shape))} {dtype} | milliseconds | of the library's form |\n| --- | --- | --- |")
  best = sorted(times, key=lambda form: times[form])[: _SHOWN.value]
  for form in dict.fromkeys([*best, *([known] if known in times else [])]):
    ratio = f"{times[form] / times[known]:.2f}" if known in times else "-"
    print(f"| {tuple(form)}{' (now)' * (form == known)} | {times[form] * 1e3:.3f} | {ratio} |", flush=True)
  seconds = [{"form": form._asdict(), "seconds": times[form]} for form in sorted(times, key=lambda form: times[form])]
  return {"shape": shape, "dtype": dtype, "now": known._asdict(), "forms": seconds}


def main(argv: list[str]) -> None:
  del argv
  gpu = device.gpu()
  print(f"{jax.devices()[0].device_kind}, compute capability {gpu.capability / 10}, jax {jax.__version__}")
  choose, tables = triton.choose_form, []
  if _OUTPUT.value:
    Path(_OUTPUT.value).mkdir(parents=True, exist_ok=True)
  end = time.perf_counter() + _SECONDS.value
  for shape, dtype in itertools.product(_SHAPES.value, _DTYPES.value):
    triton.choose_form = choose
    tables.append(search(tuple(int(size) for size in shape.split("x")), dtype, end))
    if _OUTPUT.value:
      path = Path(_OUTPUT.value, f"tune_triton_{slug(jax.devices()[0].device_kind)}.json")
      path.write_text(to_json({**described(), "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
