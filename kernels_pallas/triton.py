"""LA (see `kernels_pallas.primitive`) as a Pallas kernel with the Triton lowering, for NVIDIA GPUs from Ampere on.

A program handles one row, one head, one part and one block of value columns. It walks over the part's chunks and keeps
its block of the state in registers. Besides operands and outputs, only one state per part goes through global memory.

q, k and v are read in their layout [B, T, H, D], and query heads that share a key or value head read the same rows.
Loads and stores are masked for widths that are no power of two and for rows that end inside a chunk.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import by_platform, device, primitive
from kernels_pallas import parts as parts_lib
from kernels_pallas.parts import Parts
from kernels_pallas.primitive import Coefficients, Rows

_MIN_WIDTH = 16  # least width of a tensor core's operands
_WARPS_AT_ONCE = 8  # warps that fit on a multiprocessor, given the number of registers that our programs use


class Form(NamedTuple):
  """Sizes of a program's pieces, and compiler parameters.

  Attributes:
    chunk: number of tokens of a chunk.
    key_tile: width of the tiles into which keys are cut; smaller tiles need fewer registers at a time.
    block: number of value columns that one program handles.
    num_warps: number of warps of a program.
    num_stages: number of chunks in flight at once in the loop over chunks (software pipelining).
  """

  chunk: int
  key_tile: int
  block: int
  num_warps: int
  num_stages: int


# (compute capabilities times ten, bytes of an element, largest width, form): the first row that applies is used. Only
# the last row's form spills registers (`benchmarks/kernel_registers.py`). Before Hopper, and in float32, operands of a
# matrix product are in registers, hence the smaller pieces.
FORMS = (
  (range(90, 120), 2, 128, Form(64, 64, 64, 4, 2)),
  (range(90, 120), 2, 256, Form(64, 64, 32, 8, 2)),
  (range(80, 200), 2, 64, Form(32, 32, 64, 4, 2)),
  (range(80, 200), 2, 128, Form(32, 64, 64, 4, 2)),
  (range(80, 200), 2, 256, Form(16, 32, 64, 8, 2)),
  (range(80, 200), 4, 128, Form(16, 16, 32, 4, 1)),
  (range(80, 200), 4, 256, Form(16, 16, 32, 8, 1)),
)


def choose_form(capability: int, dtype: jnp.dtype, width: int) -> Form:
  """Returns the block sizes of the kernel: the form of the first row of FORMS that fits the GPU and the operands.

  Args:
    capability: compute capability of the GPU, times ten.
    dtype: dtype of q, k and v.
    width: max(K, V), since the backward pass runs the kernel with K and V swapped.
  """
  fits = lambda row: capability in row[0] and dtype.itemsize == row[1] and width <= row[2]  # noqa: E731
  return next(row[3] for row in FORMS if fits(row))


def refusal(q: Any, k: Any, v: Any) -> str | None:
  """Returns why these kernels cannot run q, k and v on the GPU of `device.gpu`, as an English clause; else None."""
  reason, capability = primitive.refusal(q, k, v), device.gpu().capability
  if reason is None and capability < 80:
    reason = f"it needs compute capability 8.0 (Ampere) or newer, and this GPU's is {capability / 10}"
  return reason


def attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  slopes_H: jax.Array,
  initial_state_BHKV: jax.Array,
  segment_ids_BT: jax.Array | None,
  lengths_B: jax.Array | None,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes the op with Triton kernels, with the arguments and results of `kernels_pallas.api.Implementation`.

  For the backward pass, the forward pass keeps the operands and the initial state of each part.
  """
  (batch, num_tokens, heads, key_width), value_width = q_BTHK.shape, v_BTGV.shape[-1]
  gpu = device.gpu()
  dtype = primitive.compute_dtype(q_BTHK, k_BTGK, v_BTGV)
  form = choose_form(gpu.capability, dtype, max(key_width, value_width))
  programs = batch * heads * -(-value_width // form.block)
  at_once = gpu.multiprocessors * max(1, _WARPS_AT_ONCE // form.num_warps)
  count = parts_lib.choose_count(programs, -(-num_tokens // form.chunk), at_once)
  kernels = _Kernels(parts_lib.cut(num_tokens, form.chunk, count), form, dtype)
  rows = Rows(slopes_H, segment_ids_BT, lengths_B)
  return primitive.attend(kernels, scale, q_BTHK, k_BTGK, v_BTGV, initial_state_BHKV, rows)[:2]


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """`kernels_pallas.primitive.Kernels` with the Triton lowering.

  Attributes:
    parts: how a row is cut into parts and chunks.
    form: sizes of a program's pieces.
    dtype: dtype in which matrix products take their operands.
  """

  parts: Parts
  form: Form
  dtype: Any

  def attend(self, q, k, v, states_BPHKV, rows, coefficients, *, reverse, dtype):
    batch, _, heads, key_width, value_width = states_BPHKV.shape
    task = _Task(self, k.shape[1], heads, key_width, value_width, coefficients, reverse)
    shapes = {
      "output": jax.ShapeDtypeStruct((*k.shape[:2], heads, value_width), dtype),
      "final": jax.ShapeDtypeStruct((batch, heads, key_width, value_width), jnp.float32),
    }
    results = _call(task, {"q": q, "k": k, "v": v, "states": states_BPHKV}, rows, shapes)
    return results["output"], results["final"]

  def states(self, k, v, rows, into, *, reverse):
    heads, key_width, value_width = rows.slopes_H.size, k.shape[-1], v.shape[-1]
    task = _Task(self, k.shape[1], heads, key_width, value_width, Coefficients(0.0, 0.0, into), reverse, True)
    shape = k.shape[0], self.parts.num_parts - 1, heads, key_width, value_width
    return _call(task, {"k": k, "v": v}, rows, {"added": jax.ShapeDtypeStruct(shape, jnp.float32)})["added"]


def _padded(width: int) -> int:
  """Returns the width rounded up to a power of two, at least _MIN_WIDTH."""
  return max(_MIN_WIDTH, 1 << (width - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Task:
  """Static arguments of a kernel call.

  Attributes:
    kernels: the kernels' form, and how a row is cut.
    tokens: T.
    heads: H.
    key_width, value_width: K and V, not padded.
    coefficients: coefficients of LA.
    reverse: whether LA runs from the last token to the first.
    states_only: whether the only result is what each part adds to the state.
  """

  kernels: _Kernels
  tokens: int
  heads: int
  key_width: int
  value_width: int
  coefficients: Coefficients
  reverse: bool
  states_only: bool = False

  @property
  def block(self) -> int:
    return min(self.kernels.form.block, _padded(self.value_width))

  @property
  def key_tiles(self) -> list[tuple[Any, int | None]]:
    """Slices of the padded key width, each with its number of columns that are not padding; None: all columns."""
    size = min(self.kernels.form.key_tile, _padded(self.key_width))
    starts = range(0, _padded(self.key_width), size)
    return [(pl.ds(x, size), None if x + size <= self.key_width else self.key_width - x) for x in starts]


def _kernel(given: dict[str, Any], results: dict[str, Any], *, task: _Task, native: bool) -> None:
  """Processes one part of one head of one row, for one block of value columns.

  Args:
    given: name -> reference to this program's block of an operand that `_call` describes.
    results: name -> reference to this program's block of a result.
    task: static arguments.
    native: whether the kernel is compiled for a GPU; False if it is interpreted.
  """
  parts, coefficients = task.kernels.parts, task.coefficients
  # A sum of three TF32 products is as exact as a float32 product, for which Triton's code spills kilobytes.
  exact = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if native else None
  dot = functools.partial(primitive.dot, dtype=task.kernels.dtype, exact=exact)
  part = pl.program_id(2)
  if task.states_only and task.reverse:
    part += 1  # part 0 runs last when reversed, and no other part needs its state
  ragged = "lengths" in given or parts.tokens != task.tokens
  length = given["lengths"][...] if "lengths" in given else task.tokens
  value_limit = None if task.value_width % task.block == 0 else task.value_width - pl.program_id(0) * task.block

  slope = given["slopes"][...] * math.log2(math.e)
  powers = lambda distance: jnp.exp2(-slope * jnp.maximum(distance, 0).astype(jnp.float32))  # noqa: E731
  position_C = jax.lax.iota(jnp.int32, parts.chunk)
  distance_CC = (position_C[:, None] - position_C[None, :]) * (-1 if task.reverse else 1)
  intra_CC = jnp.where(distance_CC >= 0, coefficients.intra * powers(distance_CC), 0.0)
  from_start_C = powers(position_C + 1)

  def step(i, states):
    i = i.astype(jnp.int32)
    start = (part * parts.num_chunks + (parts.num_chunks - 1 - i if task.reverse else i)) * parts.chunk
    tokens = pl.ds(start, parts.chunk)
    count = jnp.clip(length - start, 0, parts.chunk) if ragged else jnp.int32(parts.chunk)
    # Beyond the row, end_C may be any finite number: everything it multiplies is loaded as 0.
    begin_C, end_C, carry = from_start_C, powers(count - 1 - position_C), powers(count)
    if "firsts" in given:
      # The state before (after) the chunk belongs to the document of the last valid token before the chunk's start
      # (end).
      before = jnp.maximum(start - 1, 0)
      first_after = given["firsts"][jnp.maximum(jnp.minimum(start + parts.chunk, length) - 1, 0)]
      first_C = given["firsts"][tokens]
      row_CC, column_CC = (
        (first_C[None, :], position_C[:, None]) if task.reverse else (first_C[:, None], position_C[None, :])
      )
      same_document_CC = row_CC <= start + column_CC
      begin_C = jnp.where(first_C <= before, begin_C, 0.0)
      end_C = jnp.where(start + position_C >= first_after, end_C, 0.0)
      carry = jnp.where(first_after <= before, carry, 0.0)
    read_C, write_C = (end_C, begin_C) if task.reverse else (begin_C, end_C)

    row_limit = count if ragged else None
    k = [_load(given["k"].at[tokens, tile], [row_limit, limit]) for tile, limit in task.key_tiles]
    v_CV = _load(given["v"].at[tokens, :], [row_limit, value_limit])
    if not task.states_only:
      q = [_load(given["q"].at[tokens, tile], [row_limit, limit]) for tile, limit in task.key_tiles]
      scores_CC = sum(dot(x, y, (1, 1)) for x, y in zip(q, k, strict=True)) * intra_CC
      if "firsts" in given:
        scores_CC = jnp.where(same_document_CC, scores_CC, 0.0)
      carried_CV = sum(dot(x, state, (1, 0)) for x, state in zip(q, states, strict=True))
      output_CV = dot(scores_CC, v_CV, (1, 0)) + (coefficients.inter * read_C)[:, None] * carried_CV
      inside_row = task.tokens - start if parts.tokens != task.tokens else None
      _store(results["output"].at[tokens, :], output_CV, [inside_row, value_limit])
    # The weights multiply v, not k: on Hopper, Triton computes wrong products if a transposed operand was computed
    # rather than loaded (flash-linear-attention, pull request 826).
    weighted_CV = (coefficients.into * write_C)[:, None] * v_CV.astype(jnp.float32)
    return tuple(carry * state + dot(x, weighted_CV, (0, 0)) for x, state in zip(k, states, strict=True))

  if task.states_only:
    states = tuple(jnp.zeros((tile.size, task.block), jnp.float32) for tile, _ in task.key_tiles)
  else:
    states = tuple(_load(given["states"].at[tile, :], [limit, value_limit]) for tile, limit in task.key_tiles)
  states = jax.lax.fori_loop(0, parts.num_chunks, step, states)
  for (tile, limit), state in zip(task.key_tiles, states, strict=True):
    if task.states_only:
      _store(results["added"].at[tile, :], state, [limit, value_limit])
    else:
      is_last = part == (0 if task.reverse else parts.num_parts - 1)
      mask = None if parts.num_parts == 1 else jnp.full(state.shape, is_last)
      _store(results["final"].at[tile, :], state, [limit, value_limit], mask)


def _inside(shape: tuple[int, ...], limits: list[Any], mask: jax.Array | None = None) -> jax.Array | None:
  """Combines a mask with the limits of the axes: True where each index is below its axis' limit.

  Args:
    shape: shape of the block.
    limits: upper limit of the indices of each leading axis; None: no limit.
    mask: mask to combine with; None: all True.

  Returns:
    The mask, bool of the given shape; None if `mask` and all limits are None.
  """
  for axis, limit in enumerate(limits):
    if limit is not None:
      inside = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < limit
      mask = inside if mask is None else mask & inside
  return mask


def _load(ref, limits: list[Any]) -> jax.Array:
  """Loads a block; elements beyond the limits (see `_inside`) become 0, even if memory holds NaN there."""
  mask = _inside(ref.shape, limits)
  return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)


def _store(ref, x: jax.Array, limits: list[Any], mask: jax.Array | None = None) -> None:
  plgpu.store(ref, x.astype(ref.dtype), mask=_inside(x.shape, limits, mask))


def _call(task: _Task, given: dict[str, jax.Array], rows: Rows, results: dict[str, Any]) -> dict[str, jax.Array]:
  """Runs the kernel.

  Args:
    task: static arguments.
    given: "q", "k" and "v", [B, T, heads, width], where the number of heads divides H, and "states" [B, P, H, K, V];
      only "k" and "v" if `states_only`.
    rows: slopes, segment ids and lengths.
    results: shapes and dtypes of "output" [B, T, H, V] and "final" [B, H, K, V], or of "added" [B, P - 1, H, K, V].

  Returns:
    Name -> array of each result.
  """
  given = given | rows.operands(task.kernels.parts.tokens)
  return by_platform.run("cuda", _Call(task, tuple(results.items())), given, results)


@dataclasses.dataclass(frozen=True)
class _Call:
  """The `pallas_call` with its static arguments: the task, and the shapes and dtypes of its results by name."""

  task: _Task
  results: tuple[tuple[str, jax.ShapeDtypeStruct], ...]

  def __call__(self, given: dict[str, jax.Array], *, interpret: bool) -> dict[str, jax.Array]:
    task, form, parts = self.task, self.task.kernels.form, self.task.kernels.parts
    call = pl.pallas_call(
      functools.partial(_kernel, task=task, native=not interpret),
      # Programs that run together read the same rows of k and v, which caches then serve.
      grid=(-(-task.value_width // task.block), task.heads, parts.num_parts - task.states_only, given["k"].shape[0]),
      in_specs=[{name: _spec(task, name, x) for name, x in given.items()}],
      out_specs={name: _spec(task, name, x) for name, x in self.results},
      out_shape=dict(self.results),
      compiler_params=plgpu.CompilerParams(num_warps=form.num_warps, num_stages=form.num_stages),
      interpret=interpret,
      name="linear_attention",
    )
    return call(given)


def _spec(task: _Task, name: str, x: Any) -> pl.BlockSpec:
  """Returns the block of an operand or result for program (n, h, p, b): value block, head, part, row."""
  parts, key_width, block = task.kernels.parts, _padded(task.key_width), task.block
  if name in ("q", "k", "v", "output"):
    repeats, is_value = task.heads // x.shape[2], name in ("v", "output")
    head = lambda h: h if repeats == 1 else jax.lax.div(h, jnp.int32(repeats))  # noqa: E731
    index = lambda n, h, p, b: (b, 0, head(h), n if is_value else 0)  # noqa: E731
    return pl.BlockSpec((None, parts.tokens, None, block if is_value else key_width), index)
  if name in ("states", "added"):
    return pl.BlockSpec((None, None, None, key_width, block), lambda n, h, p, b: (b, p, h, 0, n))
  if name == "final":
    return pl.BlockSpec((None, None, key_width, block), lambda n, h, p, b: (b, h, 0, n))
  if name == "firsts":
    return pl.BlockSpec((None, parts.tokens), lambda n, h, p, b: (b, 0))
  return pl.BlockSpec((None,), (lambda n, h, p, b: (h,)) if name == "slopes" else (lambda n, h, p, b: (b,)))
