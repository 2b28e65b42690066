"""LA (see `kernels_pallas.primitive`) as a Pallas kernel for TPUs from v4 on.

Each program handles a few heads of one row. It walks over the row's chunks in order, along the last axis of the grid,
and keeps its states in VMEM between chunks. Of the states, only the first and the last go through HBM.

q, k and v are passed as [B, T, heads * width], the layout of a projection's output. Each block fills whole registers of
128 lanes, with two heads of width 64 for example. Query heads that share a key or value head read the same block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import by_platform, decay, primitive
from kernels_pallas.parts import Parts
from kernels_pallas.primitive import Coefficients, Rows

_LANES = 128
_CHUNK = 128  # tokens; the edge of a TPU's matrix unit, or half of it on newer generations
_SUBLANES = 16  # rows of a bfloat16 register


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
  """Computes the op with TPU kernels, with the arguments and results of `kernels_pallas.api.Implementation`."""
  num_tokens = q_BTHK.shape[1]
  chunk = min(_CHUNK, -(-num_tokens // _SUBLANES) * _SUBLANES)
  parts = Parts(1, -(-num_tokens // chunk), chunk)
  kernels = _Kernels(parts, primitive.compute_dtype(q_BTHK, k_BTGK, v_BTGV))
  rows = Rows(slopes_H, segment_ids_BT, lengths_B)
  return primitive.attend(kernels, scale, q_BTHK, k_BTGK, v_BTGV, initial_state_BHKV, rows)[:2]


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """`kernels_pallas.primitive.Kernels` on TPUs. A row is one part, since a TPU has no multiprocessors to fill.

  Attributes:
    parts: how a row is cut into chunks.
    dtype: dtype in which matrix products take their operands.
  """

  parts: Parts
  dtype: Any

  def attend(self, q, k, v, states_BPHKV, rows, coefficients, *, reverse, dtype):
    batch, _, heads, key_width, value_width = states_BPHKV.shape
    tokens, wide_key, wide_value = k.shape[1], _padded(key_width), _padded(value_width)
    q, k, v = _widen(q, wide_key), _widen(k, wide_key), _widen(v, wide_value)
    state = jnp.pad(states_BPHKV[:, 0], ((0, 0),) * 2 + ((0, wide_key - key_width), (0, wide_value - value_width)))
    count = _heads_at_once(heads, [(x.shape[2], x.shape[3]) for x in (q, k, v)] + [(heads, wide_value)])
    given = {name: x.reshape(batch, tokens, -1) for name, x in (("q", q), ("k", k), ("v", v))}
    given |= {"state": state} | rows.operands(self.parts.tokens)
    if "firsts" in given:
      ends_M = self.parts.chunk * jnp.arange(1, self.parts.num_chunks + 1)
      # "firsts_after": first token of the document to which the state after each chunk belongs. The padding of "firsts"
      # is never used for it, since the last valid token lies inside the row.
      lengths_B = rows.lengths_B if rows.lengths_B is not None else jnp.full(batch, tokens)
      given["firsts_after"] = decay.state_documents(given["firsts"], lengths_B, ends_M)[:, None]
      given["firsts"] = given["firsts"][:, None]
    groups = (*((name, x.shape[2]) for name, x in (("q", q), ("k", k), ("v", v))), ("output", heads))
    call = Call(self, tokens, heads, count, groups, (wide_key, wide_value), coefficients, reverse, jnp.dtype(dtype))
    results = by_platform.run("tpu", call, given, call.results(batch))
    output_BTHV = results["output"].reshape(batch, tokens, heads, wide_value)[..., :value_width]
    return output_BTHV, results["final"][:, :, :key_width, :value_width]

  def states(self, k, v, rows, into, *, reverse):
    raise AssertionError("There is one part.")


def _padded(width: int) -> int:
  """Returns the width rounded up to 32, 64 or a multiple of 128: 1/4, 1/2 or all of a register's lanes."""
  return next((size for size in (32, 64) if width <= size), -(-width // _LANES) * _LANES)


def _widen(x_BTHD: jax.Array, width: int) -> jax.Array:
  return jnp.pad(x_BTHD, ((0, 0),) * 3 + ((0, width - x_BTHD.shape[3]),))


def _heads_at_once(heads: int, operands: list[tuple[int, int]]) -> int:
  """Returns the smallest number of heads per program for which each operand's block fills whole registers.

  Args:
    heads: H.
    operands: (number of heads, padded width) of each operand.
  """

  def fits(count: int) -> bool:
    def whole(groups: int, width: int) -> bool:
      repeats = heads // groups
      share = max(1, count // repeats)
      aligned = count % repeats == 0 or repeats % count == 0
      return aligned and (share == groups or share * width % _LANES == 0)

    return heads % count == 0 and all(whole(*operand) for operand in operands)

  return next(count for count in range(1, heads + 1) if fits(count))


@dataclasses.dataclass(frozen=True)
class Call:
  """The `pallas_call` with its static arguments.

  Attributes:
    kernels: dtype of the products, and how a row is cut into chunks.
    tokens: T.
    heads: H.
    count: number of heads per program.
    groups: (name, number of heads) of q, k, v and the output.
    widths: padded widths of keys and values.
    coefficients: coefficients of LA.
    reverse: whether LA runs from the last token to the first.
    dtype: dtype of the output.
    semantics: for each axis of the grid, whether TPU cores may share it ("parallel") or run it in order ("arbitrary").
  """

  kernels: _Kernels
  tokens: int
  heads: int
  count: int
  groups: tuple[tuple[str, int], ...]
  widths: tuple[int, int]
  coefficients: Coefficients
  reverse: bool
  dtype: Any
  semantics: tuple[Any, Any, Any] = ("parallel", "parallel", "arbitrary")

  def __call__(self, given: dict[str, jax.Array], *, interpret: Any) -> dict[str, jax.Array]:
    batch, parts = given["q"].shape[0], self.kernels.parts
    shapes = self.results(batch)
    call = pl.pallas_call(
      functools.partial(_kernel, call=self),
      grid=(batch, self.heads // self.count, parts.num_chunks),
      in_specs=[{name: self._spec(name) for name in given}],
      out_specs={name: self._spec(name) for name in shapes},
      out_shape=shapes,
      scratch_shapes=[pltpu.VMEM((self.count, *self.widths), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=self.semantics),
      interpret=interpret,
      name="linear_attention",
    )
    return call(given)

  def results(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each result, with padded widths.

    "output" is [B, T, H * V]; "final", [B, H, K, V], is the state after the last chunk that is processed.
    """
    return {
      "output": jax.ShapeDtypeStruct((batch, self.tokens, self.heads * self.widths[1]), self.dtype),
      "final": jax.ShapeDtypeStruct((batch, self.heads, *self.widths), jnp.float32),
    }

  def repeats(self, name: str) -> int:
    """Returns how many query heads read one head of the operand."""
    return self.heads // dict(self.groups)[name]

  def chunk(self, step: jax.Array) -> jax.Array:
    """Returns the index of the chunk that is processed at a step of the grid's last axis."""
    return self.kernels.parts.num_chunks - 1 - step if self.reverse else step

  def _spec(self, name: str) -> pl.BlockSpec:
    """Returns the block of an operand or result for program (b, n, c): row, group of `count` heads, chunk step."""
    chunk = self.kernels.parts.chunk
    if name in dict(self.groups):
      repeats = self.repeats(name)
      share = max(1, self.count // repeats)
      width = self.widths[name in ("v", "output")]
      index = lambda b, n, c: (b, self.chunk(c), n * self.count // (share * repeats))  # noqa: E731
      return pl.BlockSpec((None, chunk, share * width), index)
    if name in ("state", "final"):
      return pl.BlockSpec((None, self.count, *self.widths), lambda b, n, c: (b, n, 0, 0))
    if name == "firsts":
      return pl.BlockSpec((None, 1, chunk), lambda b, n, c: (b, 0, self.chunk(c)))
    if name == "firsts_after":
      size = self.kernels.parts.num_chunks
      return pl.BlockSpec((None, 1, size), lambda b, n, c: (b, 0, 0), memory_space=pltpu.SMEM)
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def _kernel(given: dict[str, Any], results: dict[str, Any], states, *, call: Call) -> None:
  """Processes one chunk of `count` heads of one row.

  Args:
    given: name -> reference to this program's block of an operand, as `_Kernels.attend` passes it.
    results: name -> reference to this program's block of a result, see `Call.results`.
    states: reference to the states, [count, K, V] float32, in VMEM.
    call: static arguments.
  """
  dot = functools.partial(primitive.dot, dtype=call.kernels.dtype)
  row, step = pl.program_id(0), pl.program_id(2)
  first_head = pl.program_id(1) * call.count
  parts, coefficients = call.kernels.parts, call.coefficients
  size, value_width = parts.chunk, call.widths[1]

  @pl.when(step == 0)
  def _():
    states[...] = given["state"][...]

  chunk = call.chunk(step)
  start = chunk * size
  length = given["lengths"][row] if "lengths" in given else jnp.int32(call.tokens)
  ragged = "lengths" in given or parts.tokens != call.tokens
  count = jnp.clip(length - start, 0, size) if ragged else jnp.int32(size)
  row_CC, column_CC = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
  position_C1 = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
  distance_CC = column_CC - row_CC if call.reverse else row_CC - column_CC
  sees_CC, ends_C1 = distance_CC >= 0, position_C1 < count
  begins_C1 = goes_on_11 = None
  if "firsts" in given:
    # The state before (after) the chunk belongs to the document of the last valid token before the chunk's start (end).
    first_CC = jnp.broadcast_to(given["firsts"][...], (size, size))
    first_after, before = given["firsts_after"][0, chunk], jnp.maximum(start - 1, 0)
    of_row_CC = first_CC.T
    sees_CC &= first_CC <= start + row_CC if call.reverse else of_row_CC <= start + column_CC
    begins_C1 = of_row_CC[:, :1] <= before
    ends_C1 &= start + position_C1 >= first_after
    goes_on_11 = jnp.full((1, 1), first_after) <= before

  def piece(name: str, index: int) -> jax.Array:
    repeats, width = call.repeats(name), call.widths[name == "v"]
    at = index // repeats if call.count > repeats else 0
    x = given[name][:, at * width : (at + 1) * width]
    # Beyond the row's end the block may hold anything, even NaN.
    return jnp.where(position_C1 < count, x, jnp.zeros((), x.dtype)) if ragged else x

  for index in range(call.count):
    slope = given["slopes"][first_head + index]
    powers = lambda distance: jnp.exp(-slope * jnp.maximum(distance, 0).astype(jnp.float32))  # noqa: B023, E731
    begin_C1, end_C1 = powers(position_C1 + 1), jnp.where(ends_C1, powers(count - 1 - position_C1), 0.0)
    carry_11 = powers(jnp.full((1, 1), count))
    if begins_C1 is not None and goes_on_11 is not None:
      begin_C1, carry_11 = jnp.where(begins_C1, begin_C1, 0.0), jnp.where(goes_on_11, carry_11, 0.0)
    read_C1, write_C1 = (end_C1, begin_C1) if call.reverse else (begin_C1, end_C1)
    q_CK, k_CK, v_CV = piece("q", index), piece("k", index), piece("v", index)
    state_KV = states[index]
    weights_CC = jnp.where(sees_CC, coefficients.intra * powers(distance_CC), 0.0)
    scores_CC = dot(q_CK, k_CK, (1, 1)) * weights_CC
    carried_CV = dot(q_CK, state_KV, (1, 0))
    output_CV = dot(scores_CC, v_CV, (1, 0)) + coefficients.inter * read_C1 * carried_CV
    results["output"][:, index * value_width : (index + 1) * value_width] = output_CV.astype(call.dtype)
    added_KV = dot(k_CK, coefficients.into * write_C1 * v_CV.astype(jnp.float32), (0, 0))
    states[index] = carry_11 * state_KV + added_KV

  @pl.when(step == parts.num_chunks - 1)
  def _():
    results["final"][...] = states[...]
