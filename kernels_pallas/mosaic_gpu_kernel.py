"""LA (see `kernels_pallas.primitive`) as a Pallas kernel with the Mosaic GPU lowering.

A program handles one row, one head, one part and one block of value columns. One warpgroup copies chunks of q, k and v
into shared memory, _STAGES chunks ahead. The other warpgroups, the workers, handle 64 value columns each: a worker
walks over the chunks and keeps its columns of the state in registers. Besides operands and outputs, only one state per
part goes through global memory.

Matrix products read their operands from shared memory: q, k and v (the products transpose k as needed), and bfloat16
copies of the scores, the weighted values and the state. Reads beyond the end of the row give zeros; writes there are
dropped.
"""

import dataclasses
import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.parts import Parts
from kernels_pallas.primitive import Coefficients

HAS_KERNEL = jax.__version_info__ >= (0, 11)
# Any, because the module's names differ between versions of jax, and mypy takes some of its classes for abstract.
plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu") if HAS_KERNEL else None

TILE = 64  # rows of a warpgroup's matrix product; also bfloat16 elements in a swizzled line of shared memory
CHUNK = TILE  # tokens
_ROWS = 8  # rows of a tile in shared memory's layout; tokens are copied in groups of 8
_STAGES = 2  # chunks in shared memory at a time; more would not help, since copies take longer than products


def choose_workers(key_width: int, value_width: int) -> int:
  """Returns the number of workers per program: two if there are value columns and shared memory for both, else one."""
  return 2 if padded(value_width) % (2 * TILE) == 0 and key_width <= 2 * TILE else 1


def padded(width: int) -> int:
  """Returns the width rounded up to a multiple of TILE."""
  return -(-width // TILE) * TILE


@dataclasses.dataclass(frozen=True)
class Call:
  """The kernel call with its static arguments.

  Attributes:
    parts: how a row is cut into parts and chunks.
    tokens: T.
    heads: H.
    key_width, value_width: K and V, padded to multiples of 64.
    coefficients: coefficients of LA.
    reverse: whether LA runs from the last token to the first.
    states_only: whether the only result is what each part adds to the state.
  """

  parts: Parts
  tokens: int
  heads: int
  key_width: int
  value_width: int
  coefficients: Coefficients
  reverse: bool
  states_only: bool = False

  @property
  def workers(self) -> int:
    return choose_workers(self.key_width, self.value_width)

  @property
  def padded_tokens(self) -> int:
    return max(CHUNK, -(-self.tokens // _ROWS) * _ROWS)

  @property
  def tiles(self) -> int:
    """Number of tiles of the key width."""
    return self.key_width // TILE

  def split_state(self, state: jax.Array) -> jax.Array:
    """Pads states [..., K, V] and cuts them into tiles, [..., V tiles, K tiles, 64, 64].

    The interpreter supports no slices in an index, so a tile has indices of its own.
    """
    *leading, key_width, value_width = state.shape
    pad = *((0, 0),) * len(leading), (0, self.key_width - key_width), (0, self.value_width - value_width)
    return jnp.moveaxis(jnp.pad(state, pad).reshape(*leading, self.tiles, TILE, -1, TILE), -2, -4)

  def join_state(self, state: jax.Array) -> jax.Array:
    """Joins tiles into states [..., K, V], the inverse of `split_state`, except that padding is kept."""
    return jnp.moveaxis(state, -4, -2).reshape(*state.shape[:-4], self.key_width, self.value_width)

  def results(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each result: "output" and "final", or "added" if `states_only`; states are tiled."""
    state = self.heads, self.value_width // TILE, self.tiles, TILE, TILE
    if self.states_only:
      return {"added": jax.ShapeDtypeStruct((batch, self.parts.num_parts - 1, *state), jnp.float32)}
    output = batch, self.padded_tokens, self.heads, self.value_width
    return {
      "output": jax.ShapeDtypeStruct(output, jnp.bfloat16),
      "final": jax.ShapeDtypeStruct((batch, *state), jnp.float32),
    }

  def scratch(self, has_firsts: bool) -> dict[str, Any]:
    """Returns name -> shared memory or barrier of a program; `has_firsts`: whether an operand is named "firsts"."""

    def matrix(*shape: int, dtype=jnp.bfloat16):
      line = plgpu.TilingTransform((_ROWS, 128 // jnp.dtype(dtype).itemsize))
      return plgpu.SMEM(shape, dtype, transforms=(line, plgpu.SwizzleTransform(128)))

    names, workers, square = ("k",) if self.states_only else ("q", "k"), self.workers, (CHUNK, TILE)
    scratch = {name: matrix(_STAGES, CHUNK, self.key_width) for name in names}
    scratch |= {"v": matrix(_STAGES, workers, *square), "weighted": matrix(workers, *square)}
    if has_firsts:
      scratch["firsts"] = plgpu.SMEM((_STAGES, CHUNK), jnp.int32)
    if not self.states_only:
      scratch |= {name: matrix(workers, *square) for name in ("scores", "output")}
      scratch["weights"] = matrix(workers, *square, dtype=jnp.float32)
      scratch["state"] = matrix(workers, self.tiles, *square)
    return scratch | {
      "filled": plgpu.Barrier(num_arrivals=len(names) + workers + has_firsts, num_barriers=_STAGES),
      "emptied": plgpu.Barrier(num_arrivals=workers, num_barriers=_STAGES),
      "cleaned": plgpu.Barrier(num_arrivals=workers),
    }

  def __call__(self, given: dict[str, jax.Array], *, interpret: Any) -> dict[str, jax.Array]:
    if interpret is True:
      raise NotImplementedError(
        "The Mosaic GPU kernel was traced for a GPU and cannot run on a cpu: trace it in a process without a GPU."
      )
    batch, names, block = given["k"].shape[0], tuple(given), self.workers * TILE
    results = self.results(batch)

    def linear_attention(*refs, **scratch):
      _kernel(self, dict(zip([*names, *results], refs, strict=True)), scratch)

    run = plgpu.kernel(
      linear_attention,
      out_type=list(results.values()),
      scratch_types=self.scratch("firsts" in given),
      # The last axis runs fastest. Programs that run together read the same rows of k and v, which caches then serve.
      grid=(batch, self.parts.num_parts - self.states_only, self.heads, self.value_width // block),
      grid_names=("row", "part", "head", "block"),
      num_threads=self.workers + 1,
      thread_name="warpgroup",
      # Lane semantics, where layouts are stated in the kernel: inferring them takes minutes and may fail.
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
      interpret=interpret,
    )
    return dict(zip(results, run(*given.values()), strict=True))

  def interpreted(self, given: dict[str, jax.Array], **params) -> dict[str, jax.Array]:
    """Runs the kernel in the interpreter, on a CPU."""
    return self(given, interpret=plgpu.InterpretGPUParams(**params))


class _Place(NamedTuple):
  """Indices of a program in the grid."""

  call: Call
  row: jax.Array
  part: jax.Array
  head: jax.Array
  block: jax.Array

  def start(self, step: jax.Array) -> jax.Array:
    """Returns the index of the first token of the chunk that is processed at a step.

    With `states_only`, the last part to run is left out. If LA is reversed, that last part is part 0, so the other
    parts shift by one.
    """
    parts, reverse = self.call.parts, self.call.reverse
    part = self.part + 1 if self.call.states_only and reverse else self.part
    return (part * parts.num_chunks + (parts.num_chunks - 1 - step if reverse else step)) * CHUNK

  def value_tile(self, worker: int | jax.Array) -> jax.Array:
    return self.block * self.call.workers + worker


def _kernel(call: Call, memory: dict[str, Any], scratch: dict[str, Any]) -> None:
  """Processes one part of one head of one row, for one block of value columns.

  Args:
    call: static arguments.
    memory: name -> reference to an operand or result in global memory.
    scratch: name -> reference to shared memory or barriers, see `Call.scratch`.
  """
  place = _Place(call, *map(jax.lax.axis_index, ("row", "part", "head", "block")))
  warpgroup = jax.lax.axis_index("warpgroup")
  # Three warpgroups share 504 registers per thread position (40 + 2 * 232), and copying needs few of them.
  few, many = (40, 232) if call.workers == 2 else (None, None)

  @pl.when(warpgroup < call.workers)
  def _():
    if many:
      plgpu.set_max_registers(many, action="increase")
    _compute(place, memory, scratch, warpgroup)

  @pl.when(warpgroup == call.workers)
  def _():
    if few:
      plgpu.set_max_registers(few, action="decrease")
    _fill(place, memory, scratch)


def _fill(place: _Place, memory: dict[str, Any], scratch: dict[str, Any]) -> None:
  """Runs the copying warpgroup: copies each chunk into a slot of shared memory that the workers have emptied."""
  call, num_chunks = place.call, place.call.parts.num_chunks

  def step(i, _):
    i = i.astype(jnp.int32)
    slot, tokens = jax.lax.rem(i, jnp.int32(_STAGES)), pl.ds(place.start(i), CHUNK)
    pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(scratch["emptied"].at[slot]))
    bring = functools.partial(plgpu.copy_gmem_to_smem, barrier=scratch["filled"].at[slot])
    for name in ("firsts", "q", "k", "v"):
      if name == "firsts" and name in memory:
        bring(memory[name].at[place.row, tokens], scratch[name].at[slot])
      elif name in memory:
        head = jax.lax.div(place.head, jnp.int32(call.heads // memory[name].shape[2]))
        source = memory[name].at[place.row, tokens, head]
        if name != "v":
          bring(source, scratch[name].at[slot])
          continue
        for worker in range(call.workers):
          columns = pl.ds(place.value_tile(worker) * TILE, TILE)
          bring(source.at[:, columns], scratch[name].at[slot, worker])

  jax.lax.fori_loop(0, num_chunks, step, None)
  for i in range(max(0, num_chunks - _STAGES), num_chunks):
    plgpu.barrier_wait(scratch["emptied"].at[i % _STAGES])


def _compute(place: _Place, memory: dict[str, Any], scratch: dict[str, Any], worker: jax.Array) -> None:
  """Runs one worker, which computes 64 columns of the output and of the state."""
  call, (intra, inter, into), matrix = place.call, place.call.coefficients, plgpu.Layout.WGMMA
  ragged = "lengths" in memory or call.parts.tokens != call.tokens
  length = memory["lengths"][place.row] if "lengths" in memory else jnp.int32(call.tokens)
  slope = memory["slopes"][place.head] * math.log2(math.e)
  powers = lambda distance: jnp.exp2(-slope * jnp.maximum(distance, 0).astype(jnp.float32))  # noqa: E731
  position_C = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=matrix.reduce(1))
  row_CC, column_CC = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), n, layout=matrix) for n in (0, 1))
  by_row, by_column = (
    functools.partial(jax.lax.broadcast_in_dim, shape=(CHUNK, TILE), broadcast_dimensions=(n,)) for n in (0, 1)
  )
  value_tile = place.value_tile(worker)

  def share(worker, states):
    for tile, state in enumerate(states):
      scratch["state"].at[worker, tile][...] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()

  def step(i, states):
    i = i.astype(jnp.int32)
    # Hides from the compiler that the worker's index is constant, or else it keeps dozens of addresses in registers
    # across chunks.
    here = jax.lax.optimization_barrier(worker)
    own = {name: scratch[name].at[here] for name in ("weighted", "scores", "weights", "output") if name in scratch}
    slot, start = jax.lax.rem(i, jnp.int32(_STAGES)), place.start(i)
    count = jnp.clip(length - start, 0, CHUNK) if ragged else jnp.int32(CHUNK)
    k, v = scratch["k"].at[slot], scratch["v"].at[slot, here]
    k_tiles = [k.at[:, pl.ds(n * TILE, TILE)] for n in range(call.tiles)]
    plgpu.barrier_wait(scratch["filled"].at[slot])
    if "lengths" in memory:
      _clean(place, scratch["cleaned"], worker, k_tiles, v, count, row_CC)

    begin_C, end_C, carry = powers(position_C + 1), powers(count - 1 - position_C), powers(count)
    if ragged:
      end_C = jnp.where(position_C < count, end_C, 0.0)
    if "firsts" in memory:
      # The state before (after) the chunk belongs to the document of the last valid token before the chunk's start
      # (end).
      firsts, before = scratch["firsts"].at[slot], jnp.maximum(start - 1, 0)
      first_after = jnp.where(count > 0, firsts[jnp.maximum(count - 1, 0)], 0)
      first_C = plgpu.load(firsts, layout=matrix.reduce(1))
      begin_C = jnp.where(first_C <= before, begin_C, 0.0)
      end_C = jnp.where(start + position_C >= first_after, end_C, 0.0)
      carry = jnp.where(first_after <= before, carry, 0.0)
    read_C, write_C = (end_C, begin_C) if call.reverse else (begin_C, end_C)

    own["weighted"][...] = (by_row(into * write_C) * v[...].astype(jnp.float32)).astype(jnp.bfloat16)

    def from_q(scores_ref, carried_ref):
      q = scratch["q"].at[slot]
      plgpu.wgmma(scores_ref, q, k.transpose((1, 0)))
      for n in range(call.tiles):
        plgpu.wgmma(carried_ref, q.at[:, pl.ds(n * TILE, TILE)], scratch["state"].at[here, n])
      return scores_ref[...], carried_ref[...]

    if call.states_only:
      plgpu.commit_smem()
    else:
      scores_CC, carried_CV = pl.run_scoped(from_q, *[plgpu.ACC((CHUNK, TILE))] * 2)
      scores_CC *= own["weights"][...]
      if "firsts" in memory:
        first_C, of_column_C = (plgpu.load(firsts, layout=matrix.reduce(axis)) for axis in (1, 0))
        scores_CC = jnp.where(by_row(first_C) == by_column(of_column_C), scores_CC, 0.0)
      own["scores"][...] = scores_CC.astype(jnp.bfloat16)
      plgpu.commit_smem()
      output_CV = _product(own["scores"], v) + by_row(inter * read_C) * carried_CV
      if "lengths" in memory:
        output_CV = jnp.where(row_CC < count, output_CV, 0.0)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      own["output"][...] = output_CV.astype(jnp.bfloat16)
    added = (_product(tile.transpose((1, 0)), own["weighted"]) for tile in k_tiles)
    states = tuple(carry * state + x for state, x in zip(states, added, strict=True))
    plgpu.barrier_arrive(scratch["emptied"].at[slot])
    if not call.states_only:
      share(here, states)
      columns = pl.ds(value_tile * TILE, TILE)
      plgpu.copy_smem_to_gmem(own["output"], memory["output"].at[place.row, pl.ds(start, CHUNK), place.head, columns])
    return states

  def save(ref):
    for tile, state in enumerate(states):
      if hasattr(plgpu, "store"):
        plgpu.store(ref.at[tile], state, optimized=False)
      else:  # jax 0.11
        ref.at[tile][...] = state

  if call.states_only:
    zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), matrix)
    states = jax.lax.fori_loop(0, call.parts.num_chunks, step, (zeros,) * call.tiles)
    save(memory["added"].at[place.row, place.part, place.head, value_tile])
    return
  # The weights go to shared memory, or else the compiler keeps them in registers across chunks and has to spill others.
  distance_CC = column_CC - row_CC if call.reverse else row_CC - column_CC
  scratch["weights"].at[worker][...] = jnp.where(distance_CC >= 0, intra * powers(distance_CC), 0.0)
  initial = memory["states"].at[place.row, place.part, place.head, value_tile]
  states = tuple(plgpu.load(initial.at[n], layout=matrix, optimized=False) for n in range(call.tiles))
  share(worker, states)
  states = jax.lax.fori_loop(0, call.parts.num_chunks, step, states)
  plgpu.wait_smem_to_gmem(0)
  is_last = place.part == (0 if call.reverse else call.parts.num_parts - 1)
  pl.when(is_last)(lambda: save(memory["final"].at[place.row, place.head, value_tile]))


def _product(x, y) -> jax.Array:
  """Returns the product of two matrices in shared memory, as a float32 array in registers."""

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, x, y)
    return sum_ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((x.shape[0], y.shape[1])))


def _clean(place: _Place, cleaned, worker: jax.Array, k_tiles: list[Any], v, count: jax.Array, row_CC) -> None:
  """Sets the padding of k and v to zero, because padding may hold NaN, and NaN times a weight of 0 is NaN."""

  def keep(ref):
    ref[...] = jnp.where(row_CC < count, ref[...], jnp.zeros((), jnp.bfloat16))

  @pl.when(count < CHUNK)
  def _():
    keep(v)
    for n, tile in enumerate(k_tiles):  # the workers divide the tiles of k among themselves
      pl.when(worker == n % place.call.workers)(functools.partial(keep, tile))
    plgpu.commit_smem()
    plgpu.barrier_arrive(cleaned)
    plgpu.barrier_wait(cleaned)
