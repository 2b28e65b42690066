"""The interface for users: `load` returns an `LM`, a model with its parameters and tokenizer in one object."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels_pallas.api import IMPLEMENTATIONS
from supra_jax.core.programs import keep_programs
from supra_jax.core.progress import Progress
from supra_jax.core.sharding import decoding_mesh, on_mesh
from supra_jax.data.chat_template import ChatTemplate, Message
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.inference import decode
from supra_jax.inference.chat import Memory
from supra_jax.inference.engine import NOTHING, Engine, Request, not_finite_at
from supra_jax.inference.logits import logits_of
from supra_jax.inference.parameters import dtype_of, load_parameters
from supra_jax.inference.prompts import ARGUMENTS, from_state, requests, token_ids
from supra_jax.inference.sampling import TOP
from supra_jax.inference.state import State
from supra_jax.inference.text import Completion, NoText, TextBuilder
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import placed
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Padding, Transformer
from supra_jax.storage import model_directory as checkpoint

ROWS = 32  # most texts that decode at a time, unless told otherwise
CACHE = (
  1024  # texts of at most so many tokens, prompt and answer, share an engine; so do longer ones within a factor of 4
)


def load(
  directory: str | os.PathLike[str],
  dtype: Any = None,
  *,
  implementation: str = "auto",
  mesh: str | None = None,
  quantize: str | None = None,
) -> LM:
  """Loads a model directory, and sets jax to keep compiled programs on disk (see `core.programs`).

  Args:
    directory: model directory, local or gs://, that `convert_weights.hf_to_orbax`, `supra_jax.bin.linearize` or
      `supra_jax.bin.train` wrote.
    dtype: dtype of the parameters and of the computation, e.g. `"bfloat16"`; None keeps the stored dtype.
    implementation: implementation of linear attention, see `kernels_pallas.linear_attention`.
    mesh: the devices to shard the model over, `"fsdp:8"` or `"data:2,tensor:4"`: fsdp and tensor shard the parameters,
      data the texts that decode together; tensor divides the heads. None: one device.
    quantize: "int8" keeps all matrices in 8 bits, half the bytes of bfloat16; see `model.int8`. None: in `dtype`.

  Raises:
    FileNotFoundError: `directory` is not a model directory, or a part of it is missing.
    ValueError: `implementation` or `quantize` is unknown, `dtype` is not floating-point, `mesh` does not fit devices or
      model, config.json does not describe a model, the parameters are those of another model, or the tokenizer or
      generation_config.json cannot be read.
    TypeError: `dtype` is not the name of a dtype.
  """
  width = None if dtype is None else jnp.dtype(dtype)
  if width is not None and not jnp.issubdtype(width, jnp.floating):
    raise ValueError(f"dtype={dtype!r}: wanted a floating-point dtype; quantize='int8' keeps matrices in 8 bits.")
  if implementation not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(f"implementation={implementation!r}: wanted one of auto, {', '.join(IMPLEMENTATIONS)}.")
  keep_programs()
  devices = None if mesh is None else decoding_mesh(str(mesh))
  stored = load_parameters(directory, width, devices, quantize)
  tokenizer = Tokenizer.from_files(stored.tokenizer_files, stored.config)
  generation = json.loads(stored.tokenizer_files.get("generation_config.json", b"{}"))
  known = checkpoint.fingerprint(directory)
  return LM(stored.config, stored.params, tokenizer, generation, implementation, known, devices)


class LM:
  """A language model ready to use.

  Attributes:
    config: config of the model.
    params: nested dict of arrays, one subtree per layer. `load` multiplies phi's W into the projections of q and k
      where it can (`Mixer.for_inference`); `storage.model_directory.load_model` returns what is stored.
    tokenizer: tokenizer of the model; None if it has none.
    generation: contents of the model directory's generation_config.json, which has the default sampling settings.
    checkpoint: fingerprint of the model directory, by which states know their model; None if there is none.
    mesh: the mesh that the parameters are on; None: one device.
    model: the Flax module; use `model.apply({"params": params}, ...)` for what this class does not offer.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
    implementation: str = "auto",
    fingerprint: str | None = None,
    mesh: Mesh | None = None,
  ):
    """Makes an LM from its parts; `load` makes one from a model directory.

    Args:
      config: config of the model.
      params: nested dict of arrays, one subtree per layer. The computation has the dtype of the
        embedding, or of the norms if the embedding is quantized.
      tokenizer: tokenizer of the model; None if it has none.
      generation: contents of a generation_config.json, which has the default sampling settings; None means greedy.
      implementation: see `load`.
      fingerprint: see `State.checkpoint`.
      mesh: the `core.sharding.decoding_mesh` that the parameters are on; None: one device.
    """
    self.config = config
    self.params = params
    self.tokenizer = tokenizer
    self.generation = generation or {}
    self.checkpoint = fingerprint
    self.mesh = mesh
    self._memory = Memory()
    self._grows = any(mixer_class(mixer).GROWS for mixer in config.mixers)
    self.model = Transformer(config, dtype=dtype_of(params), implementation=implementation)

  @property
  def template(self) -> ChatTemplate | None:
    """The checkpoint's chat template; None if it has none."""
    return None if self.tokenizer is None else self.tokenizer.template

  def __call__(
    self,
    tokens: jax.typing.ArrayLike,
    state: DecodeState | None = None,
    *,
    lengths: jax.typing.ArrayLike | None = None,
    segment_ids: jax.typing.ArrayLike | None = None,
    padding: Padding = "right",
  ) -> tuple[jax.Array, DecodeState]:
    """Returns the logits of every position, and the state after the last token.

    Args:
      tokens: int [B, T], T >= 1. Padding may hold any value.
      state: the state to continue from, which an earlier call returned; None starts a new text. Outside jit, key/value
        caches grow as needed.
      lengths: int [B], number of real tokens in each row; None: all tokens are real.
      segment_ids: int [B, T], document ids; see `Transformer.__call__`.
      padding: the side of the padding, "right" or "left".

    Returns:
      (logits float32 [B, T, vocabulary], state). Logits at padded positions are meaningless.

    Raises:
      ValueError: `padding` is neither "right" nor "left"; or, outside jit: `tokens` are not integers [B, T], shapes do
        not fit each other, a length is not in 0 to T, or a real token is not in the vocabulary.
    """
    inputs: dict[str, Any] = {"lengths": lengths, "segment_ids": segment_ids, "padding": padding}
    with on_mesh(self.mesh):
      return logits_of(self.model, self.params, tokens, state, **inputs)

  def read(self, text: str | Sequence[int], state: State | None = None) -> State:
    """Reads a text, and returns what the model remembers of it; no logits are kept.

    Args:
      text: the text, or its token ids. A text that follows a state is read without begin-of-text token, and without the
        space that some tokenizers put before a text.
      state: the state to continue from, of one row, which stays as it is; None: a fresh one.

    Raises:
      ValueError: there is nothing to read; the state is another model's or has several rows; or there is a text and the
        model has no tokenizer.
    """
    ids = self._ids(text, state)
    if state is None:
      if not ids:
        raise ValueError(NOTHING)
      known = np.zeros(0, np.int32)
      decoded = self.model.init_state(1, decode.capacity_for(len(ids)) if self._grows else 0)
      decoded = placed(decoded, self.config, self.mesh)
    else:
      state = self._own(state, (1,))
      if not ids:
        return state
      known = state.tokens[0]
      decoded = state.decode.take(np.array([0]))
      decoded = decoded.grow(decode.capacity_for(known.size + len(ids))) if self._grows else decoded
    with on_mesh(self.mesh):
      hidden, decoded = decode.prefill(self.model, self.params, np.asarray([ids], np.int32), decoded)
    return State(decoded, hidden, (np.concatenate([known, np.asarray(ids, np.int32)]),), self.config, self.checkpoint)

  def generate(self, prompt: str | Sequence[str], **how: Any) -> str | list[str]:
    """Returns the text that follows a prompt, or a list of texts for a list of prompts; for `how` see `complete`."""
    if isinstance(prompt, str | bytes):
      return self.complete([prompt], **how)[0].text
    return [completion.text for completion in self.complete(prompt, **how)]

  def complete(
    self,
    prompts: Sequence[str | Sequence[int]],
    *,
    state: State | Sequence[State] | None = None,
    max_new_tokens: int | Sequence[int] = 100,
    stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    logprobs: int = 0,
    keep_state: bool = False,
    rows: int = ROWS,
    progress: bool = False,
    **sampling: Any,
  ) -> list[Completion]:
    """Generates the texts that follow prompts, `rows` of them at a time.

    What follows a prompt does not depend on the other prompts.

    Args:
      prompts: texts, or their token ids, of any lengths. A prompt may be empty if there is a state, or if the model has
        a begin- or end-of-text token.
      state: what the model has read before the prompts: a state of one row for all of them, of a row each, or a list of
        states. They stay as they are.
      max_new_tokens: number of tokens after which a text ends; one for all, or a list with one each.
      stop: strings that end a text, which is cut before them; a string, a list for all, or a list of lists, one each.
      stop_ids: token ids that end a text beside those of the model's config; a list for all, or a list of lists.
      logprobs: number of likeliest tokens to return with each token, at most `sampling.TOP`.
      keep_state: whether each `Completion` has the state after its last token.
      rows: most texts that decode at a time.
      progress: whether to show progress on stderr.
      **sampling: fields of `Sampling`; a value for all prompts, or a list with one each. What is not given, or None, is
        as `generation` says. A single seed is that of the first prompt; those that follow have the next numbers.

    Returns:
      A `Completion` for each prompt, in order.

    Raises:
      NotFiniteError: the logits of a text are not finite.
      ValueError: an argument is out of range, the state is another model's, or there are texts and the model has no
        tokenizer.
    """
    if isinstance(prompts, str | bytes):
      raise ValueError("prompts is a text: wanted a list of texts; `generate` takes either.")
    prompts = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if any(isinstance(prompt, int | np.integer) for prompt in prompts):
      raise ValueError("prompts holds a number: wanted a list of prompts, and token ids as in [[1, 2, 3]].")
    if not all(isinstance(n, int | np.integer) for n in (logprobs, rows)) or not 0 <= logprobs <= TOP or rows < 1:
      raise ValueError(f"logprobs={logprobs}, rows={rows}: wanted 0 to {TOP}, and at least 1.")
    states = self._states(state, len(prompts))
    how = {"max_new_tokens": max_new_tokens, "stop": stop, "stop_ids": stop_ids, **sampling}
    texts = self._texts(prompts, states, how)
    # Prompts of about the same length together, so that few programs are compiled.
    order = sorted(texts, key=lambda request: len(request.prompt))
    with Progress(len(texts), "{done}/{total} texts", enabled=progress) as shown:
      shown.advance(sum(not request.max_new_tokens for request in order))
      for request, _ in self._generated(order, texts, rows, alternatives=logprobs > 0):
        if texts[request].finish:
          shown.advance(1)
    made = []
    for number, (request, builder) in enumerate(texts.items()):
      after = None
      if keep_state:
        after = self.read([*request.prompt, *builder.tokens], states[number])
      made.append(builder.completion(logprobs, after))
    return made

  def stream(self, prompt: str | Sequence[int], **how: Any) -> Iterator[str]:
    """Yields the text that follows `prompt` in pieces, as soon as they are certain.

    For the arguments see `complete`; without logprobs, keep_state, rows and progress.

    Raises:
      NotFiniteError, ValueError: as `complete`; a ValueError is raised by the call itself.
    """
    texts = self._texts([prompt], self._states(how.pop("state", None), 1), how, keep=False)
    return self._pieces(texts)

  def _pieces(self, texts: Mapping[Request, TextBuilder]) -> Iterator[str]:
    for _, piece in self._generated(list(texts), texts, 1):
      if piece:
        yield piece

  def chat(self, messages: Sequence[Message], **how: Any) -> str:
    """Returns the reply to messages; for the arguments see `stream_chat`."""
    return "".join(self.stream_chat(messages, **how))

  def stream_chat(self, messages: Sequence[Message], **how: Any) -> Iterator[str]:
    """Yields the reply to messages in pieces.

    Messages are rendered by the checkpoint's own template, see `Tokenizer.encode_chat`. What an earlier call has read
    is not read again where these messages begin with it, as those of a conversation do; a warning says where not.

    Args:
      messages: each {"role": "system" | "user" | "assistant" | ..., "content": text}.
      **how: arguments of `stream`, but `state`.

    Raises:
      NotFiniteError: as `complete`.
      ValueError: the model has no tokenizer or no chat template, the template refuses the messages, or an argument is
        out of range; raised by the call itself.
    """
    if self.tokenizer is None or self.template is None:
      raise ValueError("This checkpoint has no chat template: use `generate` with a text.")
    ids = self.tokenizer.encode_chat(messages)
    ((request, builder),) = self._texts([ids], [None], how).items()  # raises before anything is read
    before = self._memory.longest(ids)
    known = 0 if before is None else before.tokens[0].size
    asked = self.read(ids[known:], before)
    self._memory.keep(asked)
    return self._reply(dataclasses.replace(request, prompt=[], **from_state(asked)), builder, asked)

  def _reply(self, request: Request, builder: TextBuilder, asked: State) -> Iterator[str]:
    yield from self._pieces({request: builder})
    self._memory.keep(self.read(builder.tokens, asked))

  async def astream(self, prompt: str | Sequence[int], **how: Any) -> AsyncIterator[str]:
    """Yields what `stream` yields, asynchronously: the event loop goes on while the model works."""
    pieces = self.stream(prompt, **how)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
      yield piece

  def _generated(
    self, order: Sequence[Request], texts: Mapping[Request, TextBuilder], rows: int, *, alternatives: bool = False
  ) -> Iterator[tuple[Request, str]]:
    """Generates texts in an engine; yields (request, text that is certain now) for each token."""
    groups: dict[int, list[Request]] = {}
    for request in order:
      if request.max_new_tokens:
        # The caches of an engine have one capacity, so that texts of very different lengths have engines of their own.
        groups.setdefault(math.ceil(math.log(max(request.tokens, CACHE), 4)) if self._grows else 0, []).append(request)
    for _, members in sorted(groups.items()):
      yield from self._decoded(members, texts, min(rows, len(members)), alternatives)

  def _decoded(
    self, order: Sequence[Request], texts: Mapping[Request, TextBuilder], rows: int, alternatives: bool
  ) -> Iterator[tuple[Request, str]]:
    """Does what `_generated` does, in one engine."""
    most = max(request.tokens for request in order)
    engine = Engine(self.model, self.params, rows=rows, capacity=most, alternatives=alternatives, mesh=self.mesh)
    for request in order:
      engine.submit(request)
    while engine.is_busy:
      for request, token in engine.step():
        builder = texts[request]
        if builder.finish:
          continue  # drawn before its end was known
        if not token.finite:
          raise not_finite_at(self.model, self.params, request, token, builder.last)
        piece = builder.push(token)
        if builder.finish:
          engine.finish(request)
        yield request, piece

  def _texts(
    self,
    prompts: Sequence[str | Sequence[int]],
    states: Sequence[State | None],
    how: Mapping[str, Any],
    *,
    keep: bool = True,
  ) -> dict[Request, TextBuilder]:
    """Returns a request for each prompt, with the builder of its text; `how` has arguments of `complete`."""
    ids = [self._ids(prompt, state) for prompt, state in zip(prompts, states, strict=True)]
    goes_on = [state is not None or bool(len(prompt)) for prompt, state in zip(prompts, states, strict=True)]
    decoders = [NoText() if self.tokenizer is None else self.tokenizer.stream_decoder(continues=on) for on in goes_on]
    if unknown := how.keys() - ARGUMENTS:
      raise TypeError(f"Unknown arguments: {', '.join(sorted(unknown))}.")
    return requests(ids, decoders, states, config=self.config, generation=self.generation, keep=keep, **how)

  def _ids(self, text: str | Sequence[int], state: State | None) -> list[int]:
    """Returns the token ids of a prompt; of an empty one without a state the token that begins a text."""
    return token_ids(text, self.tokenizer, self.config, continues=state is not None)

  def _states(self, state: State | Sequence[State] | None, count: int) -> list[State | None]:
    """Returns the state before each of `count` prompts, of one row and this model's own."""
    if state is None:
      return [None] * count
    if isinstance(state, list | tuple):
      if len(state) != count:
        raise ValueError(f"state has {len(state)} states for {count} prompts.")
      return [self._own(one, (1,)) for one in state]
    own = self._own(state, (1, count))
    return [own.of(number) for number in range(count)]

  def _own(self, state: Any, rows: Collection[int]) -> State:
    """Checks that a state is this model's and has one of the given numbers of rows; returns it on this model's mesh."""
    if not isinstance(state, State):
      raise ValueError(f"state is a {type(state).__name__}: wanted one that `read`, `keep_state` or `load_state` gave.")
    if state.rows not in rows:
      raise ValueError(f"The state has {state.rows} rows: wanted {' or '.join(map(str, sorted(set(rows))))}.")
    if self.checkpoint and state.checkpoint and self.checkpoint != state.checkpoint:
      raise ValueError(f"The state is of the checkpoint {state.checkpoint}, and this model of {self.checkpoint}.")
    if state.config != self.config or state.hidden.dtype != self.model.dtype:
      raise ValueError(
        f"The state is of another model: its config or dtype, {state.hidden.dtype}, is not this model's."
      )
    return state.on(self.mesh)
