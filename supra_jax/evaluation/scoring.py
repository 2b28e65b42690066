"""Log-likelihoods of continuations, as lm-evaluation-harness defines them; what several texts begin with is read once.

The texts, a context and a continuation each, form a tree: a node is a piece that all texts below it have in common. A
node is read from its parent's state, which is copied as often as the parent has children. Four answers to a question
read the question once; the questions that share examples read the examples once. Nodes of about the same length are
read together. Logits are computed only where a continuation is scored.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from supra_jax.core.progress import Progress
from supra_jax.core.sharding import on_mesh
from supra_jax.evaluation.batching import Shape, batches, room_for
from supra_jax.inference.lm import LM
from supra_jax.model.costs import row_bytes
from supra_jax.model.finite import NotFiniteError, not_finite
from supra_jax.model.placement import constrain_state, placed
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Transformer
from supra_jax.objectives.heldout import log_likelihoods

SHARED = 16  # fewest common tokens that are read as a node of their own
PIECE = 2048  # most tokens of a node
BATCH_TOKENS = {"cpu": 1024}  # tokens that are read together, padding included
ACCELERATOR_TOKENS = 16384
STATE_BYTES = {"cpu": 2**30}  # most bytes of the states that are held for what follows, and of those read together
ACCELERATOR_STATE_BYTES = 2**32
SCORED = (256, 64)  # positions whose logits are computed together; the last ones of a batch: fewer
# What a shape that is new costs, in tokens that could be read in that time: seconds of tracing and compilation.
NEW_SHAPE = {"cpu": 200.0}
ACCELERATOR_NEW_SHAPE = 50_000.0

Score = tuple[float, bool]


@dataclasses.dataclass(frozen=True)
class Text:
  """A text whose end is scored: tokens from `first` on, given those before them."""

  tokens: tuple[int, ...]
  first: int


@dataclasses.dataclass
class Node:
  """Tokens that all texts below have in common.

  Attributes:
    tokens: the tokens.
    scored: (position in `tokens`, the token that follows it, index of the text) of what is scored here.
    children: the nodes that follow.
    longest: number of tokens of the longest text through this node.
  """

  tokens: tuple[int, ...]
  scored: list[tuple[int, int, int]]
  children: list[Node]
  longest: int


@dataclasses.dataclass
class Work:
  """What a run of `scores` did: tokens of the texts, tokens that were read, and with padding."""

  asked: int = 0
  read: int = 0
  padded: int = 0

  def __add__(self, other: Work) -> Work:
    return Work(self.asked + other.asked, self.read + other.read, self.padded + other.padded)


def tree(texts: Sequence[Text]) -> list[Node]:
  """Returns the nodes that texts begin with.

  The last token of a context, whose logits score the first token of its continuation, is never shared by texts that
  differ after it: all that is scored of a text is in nodes of its own, or of texts that have the same tokens but one.
  """
  # The last token is not read: nothing follows it.
  inputs: dict[tuple[int, ...], list[int]] = {}
  for i, text in enumerate(texts):
    inputs.setdefault(text.tokens[:-1], []).append(i)
  rows = sorted(inputs)
  limit = [min(texts[i].first for i in inputs[row]) - 1 for row in rows]
  pairs = zip(itertools.pairwise(rows), itertools.pairwise(limit), strict=True)
  common = [0, *(min(common_prefix(*texts_of), *limits) for texts_of, limits in pairs)]

  def below(low: int, high: int, start: int) -> list[Node]:
    """Returns the nodes of rows [low, high), which share their first `start` tokens."""
    edges = [low, *(i for i in range(low + 1, high) if common[i] < start + SHARED), high]
    return [of(a, b, start) for a, b in itertools.pairwise(edges)]

  def of(low: int, high: int, start: int) -> Node:
    if high - low > 1:
      stop = min(common[low + 1 : high])
      return _chain(rows[low][start:stop], [], below(low, high, stop), max(map(len, rows[low:high])))
    row = rows[low]
    scored = [
      (at - 1 - start, texts[i].tokens[at], i)
      for i in inputs[row]
      for at in range(texts[i].first, len(texts[i].tokens))
    ]
    return _chain(row[start:], scored, [], len(row))

  return below(0, len(rows), 0) if rows else []


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
  """Returns how many of their first elements two sequences have in common."""
  return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chain(tokens: tuple[int, ...], scored: list[tuple[int, int, int]], children: list[Node], longest: int) -> Node:
  """Returns a node, or several in a row if there are more than PIECE tokens."""
  starts = range(0, len(tokens), PIECE)
  for start in reversed(starts):
    here = [(at - start, target, i) for at, target, i in scored if start <= at < start + PIECE]
    children = [Node(tokens[start : start + PIECE], here, children, longest)]
  return children[0]


def scores(
  lm: LM,
  texts: Sequence[Text],
  *,
  batch_tokens: int | None = None,
  progress: bool = False,
  each: Callable[[int, Score], None] | None = None,
) -> tuple[list[Score], Work]:
  """Scores the ends of texts. A score depends on the batch by rounding only.

  Args:
    lm: the model.
    texts: the texts.
    batch_tokens: tokens that are read together, padding included; None: as the device wants.
    progress: whether to show progress on stderr.
    each: is called with (index of a text, its score) as soon as the score is there.

  Returns:
    (for each text the sum of the log-likelihoods of the scored tokens in nats, and whether greedy decoding would
    produce all of them; what was done).

  Raises:
    NotFiniteError: logits are not finite; the message names the text, by its index, and the first token after which
      logits are not finite.
    ValueError: a text has no token before `first`, or none from there on.
  """
  for i, text in enumerate(texts):
    if not 0 < text.first < len(text.tokens):
      raise ValueError(
        f"Text {i} has {len(text.tokens)} tokens, scored from {text.first}: wanted some before and after."
      )
  nodes = tree(texts)
  total = sum(len(node.tokens) for node in all_nodes(nodes))
  with Progress(total, "{done:,}/{total:,} tokens read", enabled=progress) as shown, on_mesh(lm.mesh):
    backend = jax.default_backend()
    most = batch_tokens or BATCH_TOKENS.get(backend, ACCELERATOR_TOKENS)
    limits = most, STATE_BYTES.get(backend, ACCELERATOR_STATE_BYTES), NEW_SHAPE.get(backend, ACCELERATOR_NEW_SHAPE)
    run = _Run(lm, texts, limits, shown, each)
    run.read(nodes, None, [0] * len(nodes), 0)
    run.settle(0)
  run.work.asked = sum(len(text.tokens) for text in texts)
  return run.found, run.work


def all_nodes(nodes: Sequence[Node]) -> Iterator[Node]:
  """Yields nodes and all below them."""
  waiting = list(nodes)
  while waiting:
    node = waiting.pop()
    waiting += node.children
    yield node


class _Run:
  """Reads nodes, and collects the scores of their texts."""

  def __init__(self, lm: LM, texts: Sequence[Text], limits: tuple[int, int, float], shown: Progress, each: Any):
    self._lm, self._texts, self._shown, self._each = lm, texts, shown, each
    self._batch_tokens, self._state_bytes, self._new_shape = limits
    self._shapes: dict[tuple[int, bool], set[Shape]] = {}
    self._row_bytes: dict[int, int] = {}  # capacity -> bytes of a row's state
    self._grows = any(mixer_class(mixer).GROWS for mixer in lm.config.mixers)
    self._left = [len(text.tokens) - text.first for text in texts]
    self._pending: collections.deque[tuple[list[int], jax.Array, jax.Array]] = collections.deque()
    self.found: list[Score] = [(0.0, True)] * len(texts)
    self.work = Work()

  def read(self, nodes: Sequence[Node], parents: DecodeState | None, rows: Sequence[int], capacity: int) -> None:
    """Reads nodes and all below them.

    Args:
      nodes: nodes of which all parents are in `parents`, or none has one.
      parents: the state after the parents; None: nodes begin their texts.
      rows: the row of each node's parent in `parents`.
      capacity: tokens that the parents' caches have room for; 0: nodes begin their texts.
    """
    inner = sorted((i for i, node in enumerate(nodes) if node.children), key=lambda i: -nodes[i].longest)
    while inner:
      room = (capacity or room_for(nodes[inner[0]].longest)) if self._grows else 0
      most = self._rows(1, room)
      taken, inner = inner[:most], inner[most:]
      held, places = self._held(nodes, parents, rows, taken, room)
      children = [(child, places[i]) for i in taken for child in nodes[i].children]
      self.read([child for child, _ in children], held, [place for _, place in children], room)
      del held
    leaves = [i for i, node in enumerate(nodes) if not node.children]
    for batch, shape in self._batches(nodes, leaves, capacity, False):
      self._read([nodes[i] for i in batch], [rows[i] for i in batch], parents, shape, None)

  def _held(self, nodes, parents, rows, taken, capacity) -> tuple[DecodeState | None, dict[int, int]]:
    """Reads nodes that others follow; returns (the state after them, the row of each)."""
    held: DecodeState | None = None
    places: dict[int, int] = {}
    parts = list(self._batches(nodes, taken, capacity, True))
    for batch, shape in parts:
      state = self._read([nodes[i] for i in batch], [rows[i] for i in batch], parents, shape, capacity)
      places |= {i: len(places) + row for row, i in enumerate(batch)}
      if len(parts) == 1:
        return state, places
      size = 1 << (len(taken) - 1).bit_length()
      if held is None:
        held = self._fresh(size, capacity)
      slots = np.full(shape[0], size, np.int32)  # out of range: padding is dropped
      slots[: len(batch)] = [places[i] for i in batch]
      held = _put(held, slots, state)
    return held, places

  def _batches(self, nodes, chosen, capacity, keep: bool) -> Iterator[tuple[list[int], Shape]]:
    """Yields (numbers of nodes that are read together, (rows, width))."""
    known = self._shapes.setdefault((capacity, keep), set())
    lengths = [len(nodes[i].tokens) for i in chosen]
    for taken, shape in batches(lengths, lambda width: self._rows(width, capacity), known, self._new_shape):
      known.add(shape)
      yield [chosen[i] for i in taken], shape

  def _rows(self, width: int, capacity: int) -> int:
    """Returns the number of rows that are read together, a power of two."""
    if capacity not in self._row_bytes:  # found by tracing the model
      self._row_bytes[capacity] = max(row_bytes(self._lm.model, capacity), 1)
    held = self._state_bytes // self._row_bytes[capacity]
    return 1 << max(min(self._batch_tokens // width, held), 1).bit_length() - 1

  def _fresh(self, rows: int, capacity: int) -> DecodeState:
    return placed(self._lm.model.init_state(rows, capacity), self._lm.config, self._lm.mesh)

  def _read(self, nodes, rows, parents, shape, capacity) -> DecodeState | None:
    """Reads a batch of nodes; returns the state after them, with room for `capacity` tokens; None: none is wanted."""
    lm, size = self._lm, shape[0]
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(size, np.int32)
    for row, node in enumerate(nodes):
      tokens[row, : len(node.tokens)], lengths[row] = node.tokens, len(node.tokens)
    state = None
    if parents is not None:
      state = _take(parents, np.pad(rows, (0, size - len(rows))))
    elif capacity is not None:
      state = self._fresh(size, capacity)
    hidden, state = _advance(lm.model, lm.params, tokens, lengths, state, capacity is not None)
    self._score([(row, *scored) for row, node in enumerate(nodes) for scored in node.scored], hidden)
    self.work.read += int(lengths.sum())
    self.work.padded += tokens.size
    self._shown.advance(int(lengths.sum()))
    self.settle(2)
    return state

  def _score(self, scored: list[tuple[int, int, int, int]], hidden: jax.Array) -> None:
    large, small = SCORED
    while scored:
      size = large if len(scored) > large - small else small
      part, scored = scored[:size], scored[size:]
      row, at, target, text = np.asarray(part, np.int32).T
      row, at, target = (np.pad(x, (0, size - len(part))) for x in (row, at, target))
      picked = _pick(hidden, row, at)
      self._pending.append((text.tolist(), *_log_likelihoods(self._lm.model, self._lm.params, picked, target)))

  def settle(self, most: int) -> None:
    """Waits for what was scored, but for the last `most` of it, and adds it to the scores of the texts."""
    while len(self._pending) > most:
      texts, loglikelihood, greedy = self._pending.popleft()
      for i, more, likeliest in zip(texts, np.asarray(loglikelihood), np.asarray(greedy), strict=False):
        if not math.isfinite(more):
          raise NotFiniteError(f"Request {i}: {not_finite(self._lm.model, self._lm.params, [self._texts[i].tokens])}")
        score, is_greedy = self.found[i]
        self.found[i] = score + float(more), is_greedy and bool(likeliest)
        self._left[i] -= 1
        if self._each and not self._left[i]:
          self._each(i, self.found[i])


@functools.partial(jax.jit, static_argnums=(0, 5))
def _advance(model: Transformer, params, tokens_BT, lengths_B, state: DecodeState | None, keep: bool):
  hidden_BTD, state = model.bind({"params": params})(tokens_BT, state, lengths=lengths_B)
  return hidden_BTD, constrain_state(state, model.config) if keep else None


@functools.partial(jax.jit, donate_argnums=0)
def _put(held: DecodeState, slots_N, state: DecodeState) -> DecodeState:
  return held.put(slots_N, state)


@jax.jit
def _take(state: DecodeState, rows_B) -> DecodeState:
  return state.take(rows_B)


@jax.jit
def _pick(hidden_BTD, row_N, at_N):
  return hidden_BTD[row_N, at_N]


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(model: Transformer, params, hidden_ND, target_N):
  """Returns (log-likelihood float32 [N] of each target, whether it is the likeliest token, bool [N])."""
  logits_NV = model.bind({"params": params}).unembed(hidden_ND[:, None])[:, 0]
  return log_likelihoods(logits_NV, target_N), logits_NV.argmax(-1) == target_N
