"""Measures the cost of decoding against the tokens that were read: bytes of the state, and seconds a token.

Nothing is read for it: a state is filled with random numbers.
"""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.files import local
from supra_jax.core.plain_json import write_json
from supra_jax.core.progress import Progress
from supra_jax.core.run_record import run_record
from supra_jax.experiments.gathered import earlier
from supra_jax.inference.decode import decode_steps
from supra_jax.inference.lm import load
from supra_jax.inference.sampling import Draws, Sampling
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Transformer
from supra_jax.storage.model_directory import fingerprint, load_model_without_params

LENGTHS = tuple(2**n for n in range(7, 18))  # 128 to 131,072 tokens
SPARE = 1.1  # free memory that is wanted, as a multiple of what the compiled program is known to take


def measure(
  models: Mapping[str, str | os.PathLike[str]],
  lengths: Sequence[int] = LENGTHS,
  *,
  steps: int = 8,
  repeats: int = 5,
  dtype: str | None = None,
  state_dtype: str | None = None,
  output: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> list[dict[str, Any]]:
  """Measures what one text takes to decode after so many tokens.

  The program is that of the engine for greedy texts. At length N a state with room for N tokens has read N - `steps`
  of them, and its keys, values and sums are random. A repeat decodes `steps` tokens.

  Args:
    models: name -> model directory.
    lengths: numbers of tokens N.
    steps: tokens that are decoded in a repeat.
    repeats: repeats that are timed, after one that is not.
    dtype: dtype of parameters and computation; None: as stored.
    state_dtype: dtype in which states hold keys and values. None: what a model holds them in, `dtype` in a key/value
      cache and what its config says in a memory.
    output: JSON file, written after each measurement; those that it has already are not made again. None: no file.
    progress: whether to show progress on stderr.

  Returns:
    Rows of the models in order, each with `model`, `fingerprint` of its directory, `grows`, whether its state grows
    with the text, and `tokens`; and, if the length was measured, `state_bytes`, of all arrays that decoding carries
    from token to token (`State.size_bytes` has the last activations too), `dtypes` of these arrays, and `seconds` and
    `cpu_seconds` a token, medians over the repeats, with `all_seconds` of each. A length that does not fit into memory
    has `skipped`, which says so, in their place.

  Raises:
    FileNotFoundError: a model directory is not there.
    ValueError: there is no model, a length is not above `steps`, or `output` has measurements of another kind.
  """
  if not models or not lengths or min(lengths) <= steps or steps < 1 or repeats < 1:
    raise ValueError(
      f"models={[*models]}, lengths={list(lengths)}, steps={steps}, repeats={repeats}: wanted a model, lengths above "
      "the steps, and at least one step and one repeat."
    )
  about = {"figure": 1, "steps": steps, "repeats": repeats, "dtype": dtype, "state_dtype": state_dtype}
  kept = earlier(None if output is None else local(output), about, {"rows": [], "made_by": []})
  configs = {name: load_model_without_params(directory).config for name, directory in models.items()}
  marks = {name: fingerprint(directory) for name, directory in models.items()}
  known = {(row["model"], row["fingerprint"], row["tokens"]): row for row in kept["rows"] if "skipped" not in row}
  wanted = [(name, marks[name], tokens) for name in models for tokens in dict.fromkeys(lengths)]
  missing = [cell for cell in wanted if cell not in known]
  kept["made_by"] += [run_record()] if missing else []
  with Progress(len(wanted), "{done}/{total} lengths", first=len(wanted) - len(missing), enabled=progress) as shown:
    for name, mark in marks.items():
      lengths_left = [tokens for model, _, tokens in missing if model == name]
      if not lengths_left:
        continue
      lm = load(models[name], dtype)
      model = lm.model if state_dtype is None else lm.model.clone(state_dtype=jnp.dtype(state_dtype))
      about_model = {
        "model": name,
        "fingerprint": mark,
        "grows": any(mixer_class(x).GROWS for x in configs[name].mixers),
      }
      for tokens, found in _of_model(model, lm.params, lengths_left, steps, repeats):
        known[name, mark, tokens] = {**about_model, "tokens": tokens, **found}
        shown.advance(1)
        if output is not None:
          write_json(output, kept | {"rows": [*known.values()]})
      del lm, model
  return [known[cell] for cell in wanted]


def _of_model(
  model: Transformer, params: Any, lengths: Sequence[int], steps: int, repeats: int
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (tokens, what `measure` found) of a model; states of one shape, those of an RNN, share their program."""
  draws = jax.tree.map(jnp.asarray, Draws.of([Sampling()], [()], model.config.vocab_size))
  token = jnp.zeros(1, jnp.int32)
  compiled: tuple[Any, Any] = (None, None)
  for tokens in lengths:
    state = jax.eval_shape(lambda tokens=tokens: model.init_state(1, tokens))
    if compiled[0] != state:
      program = decode_steps.lower(model, steps, params, token, state, draws, np.False_, True).compile()
      compiled = state, program
    needed, free = SPARE * _bytes_taken(compiled[1], state), _free_bytes()
    if free is not None and needed > free:
      yield tokens, {"skipped": f"wants {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"}
      continue
    try:
      yield tokens, _timed(compiled[1], params, state, token, draws, tokens - steps, steps, repeats)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        raise
      yield tokens, {"skipped": "does not fit into memory"}


def _timed(
  program: Any, params: Any, shapes: DecodeState, token: Any, draws: Any, read: int, steps: int, repeats: int
) -> dict[str, Any]:
  """Decodes from a random state that has read `read` tokens; returns the fields of a row of `measure`."""
  state = _filled(shapes, read)
  arrays = jax.tree.leaves(state)
  found: dict[str, Any] = {
    "state_bytes": sum(x.nbytes for x in arrays),
    "dtypes": sorted({str(x.dtype) for x in arrays}),
  }
  del arrays  # the program consumes them
  draws = jax.tree.map(jnp.copy, draws)
  times: list[tuple[float, float]] = []
  for _ in range(1 + repeats):
    # Separate buffers: the state is donated, and one buffer cannot be donated twice.
    state = dataclasses.replace(state, cached=jnp.full(1, read, jnp.int32), position=jnp.full(1, read, jnp.int32))
    jax.block_until_ready(state)
    began = time.perf_counter(), time.process_time()
    drawn, token, state, draws = program(params, token, state, draws, np.False_)
    jax.block_until_ready((drawn, state))
    times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
  seconds, cpu_seconds = ([spent / steps for spent in spents] for spents in zip(*times[1:], strict=True))
  return found | {
    "seconds": statistics.median(seconds),
    "cpu_seconds": statistics.median(cpu_seconds),
    "all_seconds": seconds,
  }


def _filled(shapes: DecodeState, read: int) -> DecodeState:
  """Returns a random state: floats are normal, and integers, which are indices of tokens, below `read`."""
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(2**20, np.float32)  # repeated, since drawing gigabytes takes minutes

  def fill(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(np.resize(noise, x.shape), x.dtype)
    return jnp.asarray(rng.integers(0, read, x.shape), x.dtype)

  return jax.tree.map(fill, shapes)


def _bytes_taken(program: Any, state: DecodeState) -> int:
  """Returns the bytes that a program takes beside the parameters: the state, temporaries, and results of their own."""
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  known = program.memory_analysis()
  if known is None:
    return 2 * size
  return size + known.temp_size_in_bytes + max(known.output_size_in_bytes - known.alias_size_in_bytes, 0)


def _free_bytes() -> int | None:
  """Returns the bytes of memory that the device has left, of the host if it is a CPU; None: not known."""
  held = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in held:
    return held["bytes_limit"] - held["bytes_in_use"]
  try:
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
  except OSError:
    return None
  return None if found is None else 1024 * int(found[1])
