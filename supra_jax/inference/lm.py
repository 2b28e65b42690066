"""The interface for users: `load` returns an `LM`, a model with its parameters and tokenizer in one object."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.api import IMPLEMENTATIONS
from supra_jax.core.programs import keep_programs
from supra_jax.data.tokenizer import StreamDecoder, Tokenizer
from supra_jax.inference import decode as generate
from supra_jax.inference.sampling import Sampling
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Padding, Transformer
from supra_jax.storage import model_directory as checkpoint


def load(directory: str | os.PathLike[str], dtype: Any = None, *, implementation: str = "auto") -> LM:
  """Loads a model directory, and sets jax to keep compiled programs on disk (see `core.programs`).

  Args:
    directory: model directory, local or gs://, that `convert_weights.hf_to_orbax`, `supra_jax.bin.linearize` or
      `supra_jax.bin.train` wrote.
    dtype: dtype of the parameters and of the computation, e.g. `"bfloat16"`; None keeps the stored dtype.
    implementation: implementation of linear attention, see `kernels_pallas.linear_attention`.

  Raises:
    FileNotFoundError: `directory` is not a model directory, or a part of it is missing.
    ValueError: `implementation` is unknown, config.json does not describe a model, the parameters are those of another
      model, or the tokenizer or generation_config.json cannot be read.
    TypeError: `dtype` is not the name of a dtype.
  """
  if implementation not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(f"implementation={implementation!r}: wanted one of auto, {', '.join(IMPLEMENTATIONS)}.")
  keep_programs()
  stored = checkpoint.load_model(directory, None if dtype is None else jnp.dtype(dtype))
  tokenizer = Tokenizer.from_files(stored.tokenizer_files, stored.config)
  generation = json.loads(stored.tokenizer_files.get("generation_config.json", b"{}"))
  return LM(stored.config, stored.params, tokenizer, generation, implementation)


class LM:
  """A language model ready to use.

  Attributes:
    config: config of the model.
    params: nested dict of arrays, one subtree per layer.
    tokenizer: tokenizer of the model; None if it has none.
    generation: contents of the model directory's generation_config.json, which has the default sampling settings.
    model: the Flax module; use `model.apply({"params": params}, ...)` for what this class does not offer.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
    implementation: str = "auto",
  ):
    """Makes an LM from its parts; `load` makes one from a model directory.

    Args:
      config: config of the model.
      params: nested dict of arrays, one subtree per layer. The computation has the dtype of the embedding.
      tokenizer: tokenizer of the model; None if it has none.
      generation: contents of a generation_config.json, which has the default sampling settings; None means greedy.
      implementation: see `load`.
    """
    self.config = config
    self.params = params
    self.tokenizer = tokenizer
    self.generation = generation or {}
    dtype = params["embed_tokens"]["embedding"].dtype
    self.model = Transformer(config, dtype=dtype, implementation=implementation)

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
    inputs: dict[str, Any] = {"tokens": tokens, "lengths": lengths, "segment_ids": segment_ids}
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((inputs, state)))
    to_array: Callable[[Any], Any] = jnp.asarray if traced else np.asarray
    inputs = {name: None if x is None else to_array(x) for name, x in inputs.items()}
    run = self._apply if traced else self._apply_concrete
    return run(inputs.pop("tokens"), state, padding=padding, **inputs)

  def generate(self, prompt: str, **kwargs: Any) -> str:
    """Generates the text that follows `prompt`; for the arguments see `stream`."""
    return "".join(self.stream(prompt, **kwargs))

  def stream(
    self,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
  ) -> Iterator[str]:
    """Yields the text that follows `prompt` in pieces, until an end-of-text token or after `max_new_tokens`.

    temperature, top_k and top_p default to the settings in `generation` (see `Sampling.of_checkpoint`).

    Args:
      prompt: the text to continue; may be empty if the model has a begin- or end-of-text token.
      max_new_tokens: number of tokens after which generation ends.
      temperature: divides the logits; 0 takes the likeliest token each time.
      top_k: draws from the k likeliest tokens; 0 means all.
      top_p: draws from the fewest likeliest tokens whose probabilities add up to top_p; 1 means all.
      seed: seeds the draws.

    Raises:
      ValueError: the model has no tokenizer, or temperature, top_k or top_p is out of range; raised by the call itself.
        Or the prompt is empty and the model has no begin- or end-of-text token; raised at the first piece.
      NotFiniteError: the logits after a token are not finite; raised while the text is generated.
    """
    if self.tokenizer is None:
      raise ValueError(
        "This checkpoint has no tokenizer: use supra_jax.inference.decode.generate_tokens with token ids."
      )
    prompt_ids = self.tokenizer.encode(prompt)
    if not prompt_ids:
      start = [self.config.bos_token_id, *self.config.eos_token_ids]
      prompt_ids = [i for i in start if i is not None][:1]
    # With an empty prompt, the decoder drops the space that SentencePiece adds before the start of a text.
    decoder = self.tokenizer.stream_decoder(continues=bool(prompt))
    tokens = generate.generate_tokens(
      self.model,
      self.params,
      prompt_ids,
      max_new_tokens=max_new_tokens,
      sampling=Sampling.of_checkpoint(self.generation, temperature=temperature, top_k=top_k, top_p=top_p),
      seed=seed,
      stop_ids=self.config.eos_token_ids,
    )
    return filter(None, itertools.chain(map(decoder.push, tokens), _flushed(decoder)))

  def _apply_concrete(self, tokens, state, *, lengths, segment_ids, padding):
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 1:
      raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}: wanted integers [B, T] with T >= 1.")
    batch, time = tokens.shape
    for name, array, shape in (("lengths", lengths, (batch,)), ("segment_ids", segment_ids, (batch, time))):
      if array is not None and array.shape != shape:
        raise ValueError(f"{name} have shape {list(array.shape)}: wanted {list(shape)}.")
    count = np.full(batch, time) if lengths is None else lengths
    if count.min() < 0 or count.max() > time:
      raise ValueError(f"lengths are {count.tolist()}: wanted 0 to {time}.")
    step = np.arange(time)
    real = step < count[:, None] if padding == "right" else step >= time - count[:, None]
    outside = tokens[real & ((tokens < 0) | (tokens >= self.config.vocab_size))]
    if outside.size:
      raise ValueError(f"Token {outside[0]} is not in the vocabulary, 0 to {self.config.vocab_size - 1}.")

    if any(mixer_class(mixer).GROWS for mixer in self.config.mixers):
      held = np.zeros(batch, np.int64) if state is None else np.asarray(state.cached)
      state = _with_capacity(self.model, state, batch, int((held + count).max()))
    # jit compiles a program per shape: rounding T up keeps them few, and padding does not change the result.
    fill = generate.round_up_length(time) - time
    if fill and lengths is None:
      lengths = count
    sides = (0, fill) if padding == "right" else (fill, 0)
    tokens = np.pad(tokens, ((0, 0), sides))
    segment_ids = None if segment_ids is None else np.pad(segment_ids, ((0, 0), sides))
    logits, state = self._apply(
      tokens.astype(np.int32), state, lengths=lengths, segment_ids=segment_ids, padding=padding
    )
    return logits[:, sides[0] : sides[0] + time], state

  def _apply(self, tokens, state, **kwargs):
    return _logits(self.model, self.params, tokens, state, **kwargs)


def _flushed(decoder: StreamDecoder) -> Iterator[str]:
  yield decoder.flush()  # a generator, so that flush runs after the last token


@functools.partial(jax.jit, static_argnums=0, static_argnames="padding")
def _logits(model, params, tokens, state, **kwargs):
  return model.apply({"params": params}, tokens, state, method="logits", **kwargs)


def _with_capacity(model: Transformer, state: DecodeState | None, batch: int, wanted: int) -> DecodeState:
  """Returns a new or grown state with room for `wanted` tokens, rounded up to a power of two to compile few shapes."""
  capacity = 1 << max(wanted - 1, 0).bit_length()
  if state is None:
    return model.init_state(batch, capacity)
  return state if state.capacity is None or state.capacity >= wanted else state.grow(capacity)
