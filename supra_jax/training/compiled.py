"""Reads from a compiled program how many bytes its collectives move, and how much device memory it takes.

compiled = jax.jit(step).lower(state, batch).compile()
collectives(compiled.as_text()), memory(compiled)
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) .*\{$")
# The shape ends at the first ` opcode(`: no shape has a word between a space and a parenthesis.
_INSTRUCTION = re.compile(
  r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:body|condition|to_apply|calls|(?:branch|called)_computations|(?:true|false)_computation)=(%[\w.\-]+|\{[^}]*\})"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The number of collectives of one kind that one device runs in one run of a program, and the bytes they move.

  Attributes:
    count: number of collectives that run; a collective in a loop counts once per iteration.
    bytes: XLA's element type (`bf16`, say) -> bytes moved, as `collectives` counts them.
    exact: False if XLA does not say how often some of these collectives run: they are in a loop without
      `known_trip_count`, or in a branch of a conditional. Every branch is counted as taken.
  """

  count: int
  bytes: Mapping[str, int]
  exact: bool

  @property
  def total_bytes(self) -> int:
    return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class Memory:
  """The device memory that a program takes, in bytes per device.

  Attributes:
    arguments: bytes of all arguments.
    outputs: bytes of all outputs, those that reuse the memory of a donated argument included.
    aliased: bytes of the outputs that reuse the memory of a donated argument.
    temporaries: bytes of everything else that the program allocates.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int

  @property
  def peak(self) -> int:
    """Upper bound of the peak memory in bytes per device; the true peak is lower if not all arrays live at once."""
    return self.arguments + self.outputs - self.aliased + self.temporaries


def memory(compiled: Any) -> Memory | None:
  """Returns what `jax.stages.Compiled.memory_analysis()` reports; None if the backend has no memory analysis."""
  stats = compiled.memory_analysis()
  if stats is None:
    return None
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
  )


def collectives(hlo_text: str) -> dict[str, Traffic]:
  """Counts the collectives that one run of a program executes, and the bytes they move; loops are multiplied out.

  The bytes of a collective are those of the larger array on one device: the result of an all-gather, the operands of
  every other kind. A ring over n devices sends (n - 1)/n of these bytes over each link for an all-gather or a
  reduce-scatter, and twice that for an all-reduce. XLA's CPU backend moves bfloat16 as float32.

  The number of iterations of a loop is XLA's `known_trip_count`. A loop without one is assumed to count from 0 by 1, as
  `jax.lax.scan` does, up to the constant in its condition; if the condition has no constant, one iteration is assumed.

  Args:
    hlo_text: `jax.stages.Compiled.as_text()`; its shapes are the shapes on one device.

  Returns:
    {kind: traffic} for the kinds of KINDS that occur. An asynchronous pair (start, done) counts as one collective.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _parse(hlo_text)
  count: collections.Counter[str] = collections.Counter()
  moved: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
  inexact = set()

  def visit(name: str, times: int, exact: bool) -> None:
    scope = computations[name]
    for instruction in scope.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS:
        count[kind] += times
        for dtype, size in _payload(instruction, scope).items():
          moved[kind][dtype] += times * size
        if not exact:
          inexact.add(kind)
      turns, known = _turns(instruction, computations)
      for called in instruction.called():
        visit(called, times * turns, exact and known)

  visit(entry, 1, True)
  return {kind: Traffic(count[kind], dict(moved[kind]), kind not in inexact) for kind in KINDS if count[kind]}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line of HLO text: the result's shape, the opcode, and the text after the opcode's opening parenthesis."""

  shape: str
  opcode: str
  rest: str
  is_root: bool

  @property
  def arguments(self) -> str:
    return self.rest.partition(")")[0]

  def operands(self) -> list[str]:
    return _NAME.findall(self.arguments)

  def attribute(self, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else ""

  def called(self) -> list[str]:
    """Returns the names of the computations that this instruction runs."""
    if self.opcode in ("async-update", "async-done"):
      return []  # they name what their async-start has run
    return [name for names in _CALLED.findall(self.rest) for name in _NAME.findall(names)]


_Computation = dict[str, _Instruction]


def _parse(hlo_text: str) -> tuple[dict[str, _Computation], str]:
  """Returns ({name of a computation: {name of an instruction: instruction}}, name of the entry computation)."""
  computations: dict[str, _Computation] = {}
  entry, current = None, None
  for line in hlo_text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations[head["name"]] = {}
      entry = head["name"] if head["entry"] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current[found["name"]] = _Instruction(found["shape"], found["opcode"], found["rest"], bool(found["root"]))
  if entry is None:
    raise ValueError(
      f"No ENTRY computation in the text; wanted what Compiled.as_text() returns, got {hlo_text[:80]!r}."
    )
  return computations, entry


def _turns(instruction: _Instruction, computations: dict[str, _Computation]) -> tuple[int, bool]:
  """Returns (how often an instruction runs the computations that it calls, whether that number is certain)."""
  if instruction.opcode != "while":
    return 1, instruction.opcode != "conditional"
  if found := _TRIP_COUNT.search(instruction.rest):
    return int(found[1]), True
  scope = computations[instruction.attribute("condition")]
  compare, given = _root(scope), []
  if compare.opcode == "fusion":
    given = [scope[name] for name in compare.operands()]
    scope = computations[compare.attribute("calls")]
    compare = _root(scope)
  if compare.opcode != "compare" or compare.attribute("direction") != "LT":
    return 1, False
  limit = scope[compare.operands()[1]]
  if limit.opcode == "parameter" and given:
    limit = given[int(limit.arguments)]
  is_count = limit.opcode == "constant" and limit.shape[0] in "su" and limit.arguments.isdigit()
  return int(limit.arguments) if is_count else 1, False


def _root(computation: _Computation) -> _Instruction:
  return next(instruction for instruction in computation.values() if instruction.is_root)


def _payload(instruction: _Instruction, scope: _Computation) -> collections.Counter[str]:
  """Returns {element type: bytes} of the result of an all-gather, or of the operands of any other collective."""
  operands = _bytes(" ".join(scope[name].shape for name in instruction.operands()))
  if not instruction.opcode.startswith("all-gather"):
    return operands
  result = _bytes(instruction.shape)
  # The shape of all-gather-start lists operands and results together.
  return result - operands if instruction.opcode.endswith("-start") else result


def _bytes(shape: str) -> collections.Counter[str]:
  """Returns {element type: bytes} of all arrays in a shape: `(f32[6,64]{1,0}, s32[])` -> {f32: 1536, s32: 4}."""
  sizes: collections.Counter[str] = collections.Counter()
  for dtype, dimensions in _ARRAY.findall(shape):
    # The first number in a type's name is its bits: bf16, f8e4m3fn, s4, c64. `pred` has 8 bits, XLA's `token` none.
    bits = re.search(r"\d+", dtype)
    width = int(bits[0]) if bits else 8 * (dtype == "pred")
    sizes[dtype] += math.ceil(width * math.prod(int(size) for size in dimensions.split(",") if size) / 8)
  return sizes
