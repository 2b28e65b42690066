"""A fixed number of rows that decode together: texts come and go, and no text changes another.

One compiled step decodes all rows. A text that is submitted waits for a free row; its prompt is read in pieces between
steps, so that long prompts do not hold up the others.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supra_jax.core.sharding import batch_shards, on_mesh
from supra_jax.inference import decode
from supra_jax.inference.sampling import Draws, Sampling
from supra_jax.model.costs import row_bytes
from supra_jax.model.finite import NotFiniteError, generated_not_finite, not_finite
from supra_jax.model.placement import placed
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Transformer

NOTHING = "The prompt is empty, and the model has no token that starts or ends a text: give at least one."


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A text to generate.

  Attributes:
    prompt: token ids to read; may be empty if `hidden` is given.
    sampling: how tokens are drawn.
    max_new_tokens: number of tokens to draw, at least 1.
    state: the state to continue from, one row; None: a fresh one. It is left as it is.
    hidden: activations [1, D] after the last token that `state` has read.
    read: token ids that `state` has read, for the repetition penalty.
  """

  prompt: Sequence[int]
  sampling: Sampling = Sampling()
  max_new_tokens: int = 100
  state: DecodeState | None = None
  hidden: jax.Array | None = None
  read: Sequence[int] = ()

  @property
  def tokens(self) -> int:
    """Most tokens of the text: what its state has read, prompt and answer."""
    return len(self.read) + len(self.prompt) + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Token:
  """A token that was drawn for a request.

  Attributes:
    id: the token.
    number: how many tokens were drawn for the request before it.
    finite: whether the logits that it was drawn from are all finite.
    logprob: its log-probability under the model, in nats.
    top: {token: log-probability} of the likeliest tokens; empty unless the engine was made with `alternatives`.
  """

  id: int
  number: int
  finite: bool
  logprob: float
  top: Mapping[int, float]


@dataclasses.dataclass
class _Reading:
  """A request whose prompt is being read."""

  request: Request
  slot: int
  pieces: list[tuple[int, int]]
  hidden: jax.Array
  state: DecodeState


class Engine:
  """Decodes a fixed number of rows."""

  def __init__(
    self,
    model: Transformer,
    params: Mapping[str, Any],
    *,
    rows: int,
    capacity: int,
    alternatives: bool = False,
    mesh: Mesh | None = None,
  ):
    """Makes an engine without texts.

    Args:
      model: the model, not stacked.
      params: the model's parameters, one subtree per layer.
      rows: number of texts that decode at a time.
      capacity: most tokens of a text, prompt and answer, with what its state has read; without effect for models whose
        state does not grow.
      alternatives: whether the likeliest tokens beside each drawn one are wanted.
      mesh: the mesh that the parameters are on; None: one device.
    """
    self._mesh = mesh
    if mesh is not None:
      rows = -(-rows // batch_shards(mesh)) * batch_shards(mesh)  # no device has fewer than another
    self.model, self.params, self.rows = model, params, rows
    self._grows = any(mixer_class(name).GROWS for name in model.config.mixers)
    self._capacity = decode.capacity_for(capacity) if self._grows else 0
    self._most = capacity
    self._alternatives = np.bool_(alternatives)
    try:
      self._state = placed(model.init_state(rows, self._capacity), model.config, mesh)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      size = rows * row_bytes(model, self._capacity)
      raise ValueError(
        f"The states of {rows} texts of up to {capacity} tokens take {size:,} bytes, more than there are: wanted fewer "
        "rows, or a smaller max_new_tokens."
      ) from error
    blank = Draws.of([Sampling()] * rows, [()] * rows, model.config.vocab_size)
    self._draws = jax.tree.map(jnp.asarray, blank)
    self._token = jnp.zeros(rows, jnp.int32)
    self._slots: list[Request | None] = [None] * rows
    self._drawn: dict[Request, int] = {}
    self._due: dict[Request, int] = {}  # tokens of each text in a row that no call was made for
    self._waiting: collections.deque[Request] = collections.deque()
    self._reading: _Reading | None = None
    # What was dispatched and not yet looked at: (requests of the rows then, what they drew).
    self._ready: collections.deque[tuple[list[Request | None], Any]] = collections.deque()

  @property
  def is_busy(self) -> bool:
    """Whether a text waits, is read or decodes."""
    return bool(self._waiting or self._reading or self._drawn)

  def submit(self, request: Request) -> None:
    """Adds a text, which waits for a free row.

    Raises:
      ValueError: there is nothing to read, or the text does not fit into the engine's capacity.
    """
    if not len(request.prompt) and request.hidden is None:
      raise ValueError(NOTHING)
    if request.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={request.max_new_tokens}: wanted at least 1.")
    held = 0 if request.state is None else int(request.state.cached[0])
    wanted = held + len(request.prompt) + request.max_new_tokens
    if self._grows and wanted > self._most:
      raise ValueError(f"A text of {wanted} tokens, prompt and answer, is longer than the {self._most} of this engine.")
    self._waiting.append(request)

  def finish(self, request: Request) -> None:
    """Ends a text early: its row is free, and no further token of it is returned."""
    self._drawn.pop(request, None)
    self._due.pop(request, None)
    self._slots = [None if held is request else held for held in self._slots]
    if request in self._waiting:
      self._waiting.remove(request)
    if self._reading and self._reading.request is request:
      self._reading = None

  def step(self) -> list[tuple[Request, Token]]:
    """Reads a piece of a prompt, and decodes some tokens of all rows.

    Returns:
      Tokens in the order in which they were drawn. A text ends with its last token, number `max_new_tokens` - 1, or by
      `finish`.
    """
    with on_mesh(self._mesh):
      return self._step()

  def _step(self) -> list[tuple[Request, Token]]:
    self._read()
    if self._is_decoding():
      self._due = {request: due - decode.DECODE_TOKENS for request, due in self._due.items()}
      drawn, self._token, self._state, self._draws = decode.decode_steps(
        self.model,
        decode.DECODE_TOKENS,
        self.params,
        self._token,
        self._state,
        self._draws,
        self._alternatives,
        self._is_plain(self._slots),
      )
      self._ready.append((list(self._slots), drawn))
    # The newest call goes on while the host looks at the one before it.
    found = []
    while len(self._ready) > (1 if self._is_decoding() else 0):
      found += list(self._look(*self._ready.popleft()))
    return found

  def _is_plain(self, requests: Sequence[Request | None]) -> bool:
    return not self._alternatives and all(request.sampling.plain for request in requests if request is not None)

  def _is_decoding(self) -> bool:
    return any(due > 0 for due in self._due.values())

  def _look(self, requests: list[Request | None], drawn: Any) -> Iterator[tuple[Request, Token]]:
    drawn = jax.tree.map(np.asarray, drawn)
    for step in range(drawn.token.shape[0]):
      for row, request in enumerate(requests):
        if request is None or request not in self._drawn:
          continue
        number = self._drawn[request]
        top = {}
        if self._alternatives:
          top = dict(zip(drawn.top_tokens[step, row].tolist(), drawn.top_logprobs[step, row].tolist(), strict=True))
        token = Token(
          int(drawn.token[step, row]), number, bool(drawn.finite[step, row]), float(drawn.logprob[step, row]), top
        )
        self._drawn[request] = number + 1
        if number + 1 == request.max_new_tokens:
          self.finish(request)
        yield request, token

  def _read(self) -> None:
    """Reads PREFILL_TOKENS of prompts, or one piece if the next is longer."""
    left = decode.PREFILL_TOKENS
    while left > 0 and self._begin_reading():
      reading = self._reading
      assert reading is not None
      if reading.pieces:
        piece = reading.pieces.pop(0)
        left -= piece[1]
        prompt = np.asarray([reading.request.prompt], np.int32)
        lengths = np.asarray([prompt.shape[1]])
        reading.hidden, reading.state = decode.read_piece(
          self.model, self.params, prompt, lengths, piece, reading.hidden, reading.state
        )
      if not reading.pieces:
        self._put(reading)
        self._reading = None

  def _begin_reading(self) -> bool:
    """Takes the next text that waits, if none is being read and a row is free; returns whether one is being read."""
    free = [slot for slot, request in enumerate(self._slots) if request is None]
    if self._reading is None and free and self._waiting:
      request = self._waiting.popleft()
      # The programs consume what they are given, so that what belongs to the caller is copied.
      state = self.model.init_state(1, self._capacity) if request.state is None else request.state.take(np.array([0]))
      state = state.grow(self._capacity) if self._grows else state
      hidden = decode.no_hidden(self.model, 1) if request.hidden is None else jnp.array(request.hidden)
      self._reading = _Reading(request, free[0], decode.pieces(len(request.prompt)), hidden, state)
    return self._reading is not None

  def _put(self, reading: _Reading) -> None:
    """Draws the first token of a text whose prompt is read, and puts the text into its row."""
    request = reading.request
    read = [*request.read, *request.prompt]
    draws = Draws.of([request.sampling], [read], self.model.config.vocab_size)
    # A float64 model's state is wider than `init_state` has it.
    self._state = jax.tree.map(lambda x, read: x.astype(read.dtype), self._state, reading.state)
    plain = self._is_plain([request])
    drawn, draws = decode.first_token(self.model, self.params, reading.hidden, draws, self._alternatives, plain)
    self._token, self._state, self._draws = decode.put_rows(
      self.model, self._token, self._state, self._draws, np.asarray([reading.slot]), drawn.token, reading.state, draws
    )
    self._slots[reading.slot], self._drawn[request], self._due[request] = request, 0, request.max_new_tokens - 1
    self._ready.append(([request], jax.tree.map(lambda x: x[None], drawn)))


def generate_tokens(
  model: Transformer,
  params: Mapping[str, Any],
  prompt_ids: Sequence[int],
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  stop_ids: Collection[int] = (),
) -> Iterator[int]:
  """Yields the tokens that the model generates after a prompt, alone in an engine of one row.

  Args:
    model: the model, not stacked.
    params: the model's parameters, one subtree per layer.
    prompt_ids: token ids of the prompt, at least one.
    max_new_tokens: number of tokens after which generation ends; below 1: no token is generated.
    sampling: how a token is drawn; greedy by default.
    stop_ids: token ids that end the text; they are not yielded.

  Raises:
    NotFiniteError: the logits after a token are not finite; the message says after which token.
    ValueError: the prompt is empty; raised when the first token is asked for.
  """
  if max_new_tokens < 1:
    if not len(prompt_ids):
      raise ValueError(NOTHING)
    return
  engine = Engine(model, params, rows=1, capacity=len(prompt_ids) + max_new_tokens)
  engine.submit(Request(prompt_ids, sampling, max_new_tokens))
  last = None
  while engine.is_busy:
    for request, token in engine.step():
      if not token.finite:
        raise not_finite_at(model, params, request, token, last)
      if token.id in stop_ids:
        return
      last = token
      yield token.id


def not_finite_at(
  model: Transformer, params: Mapping[str, Any], request: Request, token: Token, last: Token | None
) -> NotFiniteError:
  """Returns the error for logits that are not finite, from which `token` was drawn after the token `last`."""
  if last is not None:
    return generated_not_finite(model, token.number, last.id)
  of_state = "The state that the text goes on from is not finite: read its text again."
  otherwise = None if request.state is None else of_state
  return not_finite(model, params, [[*request.read, *request.prompt]], otherwise=otherwise)
