"""The compiled programs of generation: reading prompts in pieces, and steps of decoding with draws."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.sharding import constrain
from supra_jax.inference.sampling import Drawn, Draws, draw
from supra_jax.model.placement import constrain_state
from supra_jax.model.transformer import DecodeState, Transformer

PREFILL_TOKENS = 512  # most tokens of a piece of the prompt, so that activations do not grow with the prompt
SHORTEST_PREFILL = 16  # least tokens of a piece; padding to 16 costs no time, since reading the weights takes longer
SHORTEST_CACHE = 64  # least tokens that a cache has room for
DECODE_TOKENS = 8  # steps per call of the decode loop: enough to hide the host's work, few enough to stream


def round_up_length(n: int) -> int:
  """Rounds n up to a number of three significant bits (1, 2, .., 8, 10, 12, 14, 16, 20, ...), at most 1.25 n."""
  step = 1 << max(n.bit_length() - 3, 0)
  return -(-n // step) * step


def capacity_for(tokens: int) -> int:
  """Returns the capacity of a state for a text of so many tokens, prompt and answer.

  It has room for DECODE_TOKENS more, since the last call of `decode_steps` may draw more than are wanted. It is rounded
  up, so that texts of about the same length share their programs.
  """
  return max(round_up_length(tokens + DECODE_TOKENS), SHORTEST_CACHE)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _read(model: Transformer, params, tokens_BT, state: DecodeState, hidden_BD, lengths_B):
  """Returns (hidden [B, D] after each row's last real token so far, state after these tokens)."""
  hidden_BTD, state = model.bind({"params": params})(tokens_BT, state, lengths=lengths_B)
  last = jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
  return jnp.where((lengths_B > 0)[:, None], last, hidden_BD), constrain_state(state, model.config)


def pieces(longest: int) -> list[tuple[int, int]]:
  """Returns (start, tokens with padding) of each piece that a prompt of so many tokens is read in."""
  found = []
  for start in range(0, longest, PREFILL_TOKENS):
    count = min(PREFILL_TOKENS, longest - start)
    found.append((start, max(round_up_length(count), SHORTEST_PREFILL)))
  return found


def read_piece(
  model: Transformer,
  params: Mapping[str, Any],
  tokens_BT: np.ndarray,
  lengths_B: np.ndarray,
  piece: tuple[int, int],
  hidden_BD: jax.Array,
  state: DecodeState,
) -> tuple[jax.Array, DecodeState]:
  """Reads one of `pieces` of a prompt.

  Args:
    model: the model, not stacked.
    params: the model's parameters, one subtree per layer.
    tokens_BT: int32 [B, T], padded on the right.
    lengths_B: number of real tokens in each row.
    piece: which piece.
    hidden_BD: what the piece before this one returned; `no_hidden` before the first. Donated.
    state: the state to continue from, with room for the tokens; donated.

  Returns:
    (activations after each row's last real token, [B, D], which `unembed` takes; state after it).
  """
  start, width = piece
  tokens = tokens_BT[:, start : start + PREFILL_TOKENS]
  counts = np.clip(np.asarray(lengths_B) - start, 0, tokens.shape[1]).astype(np.int32)
  tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
  return _read(model, params, tokens.astype(np.int32), state, hidden_BD, counts)


def no_hidden(model: Transformer, batch: int) -> jax.Array:
  """Returns the activations of rows that have read nothing."""
  return jnp.zeros((batch, model.config.hidden_size), model.dtype)


def prefill(
  model: Transformer,
  params: Mapping[str, Any],
  tokens_BT: np.ndarray,
  state: DecodeState,
  lengths_B: np.ndarray | None = None,
) -> tuple[jax.Array, DecodeState]:
  """Reads a prompt in pieces of PREFILL_TOKENS.

  Args:
    model: the model, not stacked.
    params: the model's parameters, one subtree per layer.
    tokens_BT: int32 [B, T], T >= 1, padded on the right.
    state: the state to continue from, with room for T more tokens; it is donated.
    lengths_B: number of real tokens in each row; None means T.

  Returns:
    (activations after the last token of each row, [B, D], which `unembed` takes; state after that token).
  """
  batch, time = tokens_BT.shape
  lengths = np.full(batch, time) if lengths_B is None else lengths_B
  hidden = no_hidden(model, batch)
  for piece in pieces(time):
    hidden, state = read_piece(model, params, tokens_BT, lengths, piece, hidden, state)
  return hidden, state


@functools.partial(jax.jit, static_argnums=0)
def unembed(model: Transformer, params, hidden_BD: jax.Array) -> jax.Array:
  """Returns the logits [B, V] of activations [B, D]."""
  return model.bind({"params": params}).unembed(hidden_BD[:, None])[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 5))
def first_token(
  model: Transformer, params, hidden_BD: jax.Array, draws: Draws, alternatives, plain: bool = False
) -> tuple[Drawn, Draws]:
  """Draws the token after the prompt of each row."""
  return draw(unembed(model, params, hidden_BD), draws, alternatives, plain)


@functools.partial(jax.jit, static_argnums=(0, 1, 7), donate_argnums=(4, 5))
def decode_steps(
  model: Transformer,
  steps: int,
  params,
  token_B: jax.Array,
  state: DecodeState,
  draws: Draws,
  alternatives,
  plain: bool = False,
) -> tuple[Drawn, jax.Array, DecodeState, Draws]:
  """Decodes `steps` tokens: each step reads the last token and draws the next. State and draws are donated.

  Returns:
    (what was drawn, each array [steps, B, ...]; last token [B]; state; draws).
  """

  def step(carry, _):
    token, state, draws = carry
    logits, state = model.bind({"params": params}).logits(token[:, None], state)
    drawn, draws = draw(logits[:, 0], draws, alternatives, plain)
    return (drawn.token, constrain_state(state, model.config), _by_rows(draws)), drawn

  (token_B, state, draws), drawn = jax.lax.scan(step, (token_B, state, draws), length=steps)
  return drawn, token_B, state, draws


def _by_rows(tree: Any) -> Any:
  return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), tree)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def put_rows(model, token_B, state: DecodeState, draws: Draws, slots, token_N, other: DecodeState, other_draws: Draws):
  """Puts N rows, which have read their prompts and drawn a token, into slots; returns (token_B, state, draws)."""
  token_B, draws = _by_rows((token_B.at[slots].set(token_N), draws.put(slots, other_draws)))
  return token_B, constrain_state(state.put(slots, other), model.config), draws
