"""Gives every key/value head of a memory a size of its own, so that the least is lost a byte.

For each layer, head and size, what a head loses is estimated on the teacher's own streams, in nats a token: half the
mean square of its gradient's product with its error. The error is what its attention says with all tokens and does not
say with those that it would hold, behind W_o; the gradient is that of the text's loss there. This is the divergence of
predictions to second order, with the diagonal over tokens of the Fisher information (Amari 1998; as a measure of what
can be pruned: Theis et al. 2018, arXiv 1801.05787).

Layers with the same sizes compile once. So there are a few patterns of sizes, and each layer has one of them, whose
larger sizes it gives to the heads that need them: `with_order` puts the heads in order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from supra_jax.core.sharding import constrain
from supra_jax.linearization.calibrate import Report
from supra_jax.linearization.hybrid import block, embed, last_norm, outside_layers
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Norm, at_least_float32
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer
from supra_jax.objectives.losses import count_targets, hidden_loss, inputs_of

MOST_HEADS = 8  # of a pattern: the patterns of four sizes are then 165
MOST_SIZES = 4  # of a pattern, each of which adds to the time of compilation


class Allotment(NamedTuple):
  """What each head retains.

  Attributes:
    retained: int [L, P], number of tokens of each head of a layer's pattern, sorted.
    order: int [L, G], the heads of the teacher in the order in which they take the places of the pattern's repeats.
    error: the sum of the errors of all heads.
  """

  retained: np.ndarray
  order: np.ndarray
  error: float


def head_errors(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  choices: Sequence[MemoryConfig],
  batches: Sequence[Mapping[str, Any]],
  *,
  dtype: Any = jnp.float32,
  report: Report | None = None,
) -> np.ndarray:
  """Returns what each head loses on each batch, in nats a target, float64 [batches, L, G, choices].

  The streams of a batch, L * tokens * hidden_size numbers, are in memory at once: they are read backwards.

  Args:
    teacher: (parameters, one subtree per layer, and config) of the softmax model.
    choices: memories whose heads are all of one size.
    batches: rows to read, as `language_model_loss` takes them; what is no target does not count.
    dtype: dtype of the computation.
    report: called after each layer of each batch, from the last layer to the first, with the number of layers of all
      batches and the largest of its errors.

  Raises:
    ValueError: activations, or the loss, are not finite.
  """
  params, config = teacher
  model = Transformer(config, jnp.dtype(dtype))
  errors = np.zeros((len(batches), config.num_layers, config.num_kv_heads, len(choices)))
  ends = outside_layers(params)
  layers = [(layer, params[f"layers_{number}"]) for number, layer in enumerate(config.layers)]
  for i, batch in enumerate(batches):
    streams = [embed(model, ends, batch)]
    for told in layers:
      streams.append(block(model, *told, streams[-1], batch))
    gradient = _gradient(model, ends, streams.pop(), batch)
    for number, told in reversed(list(enumerate(layers))):
      gradient, lost = _lost(model, tuple(choices), *told, streams.pop(), gradient, batch)
      errors[i, number] = lost
      worst = float(errors[i, number].max())
      if not np.isfinite(worst):
        raise ValueError(
          "Sizes of heads cannot be measured: the teacher's activations are not finite. "
          "`supra_jax.bin.evaluate` on the teacher says from which token on."
        )
      if report is not None:
        where = f"batch {i + 1} of {len(batches)}, heads of layer {number}"
        report(number, config.num_layers * len(batches), worst, f"{where} lose up to {worst:.4f} nats")
  return errors


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model: Transformer, ends, x_BTD: jax.Array, batch) -> jax.Array:
  """Returns the gradient of the loss, summed over targets, with respect to the stream after the last layer."""

  return jax.grad(lambda x_BTD: hidden_loss(model, ends, last_norm(model, ends, x_BTD), batch).loss)(x_BTD)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lost(
  model: Transformer, choices: tuple[MemoryConfig, ...], layer: MixerConfig, params, x_BTD, gradient_BTD, batch
):
  """Returns (the gradient where a layer is entered, what each head loses with each choice [G, choices])."""
  c = model.config
  tokens_BT, segment_ids = inputs_of(batch)
  context, _ = Transformer(c.replace(layers=(layer, *choices))).place(tokens_BT, segment_ids=segment_ids)
  run: Any = functools.partial(Block(c, layer, model.dtype).apply, {"params": params})
  mixed_BTD, back_to_enter = jax.vjp(lambda x_BTD: run(x_BTD, None, context, method="attend")[0], x_BTD)
  _, back_to_mixed = jax.vjp(functools.partial(run, method="feed"), x_BTD + mixed_BTD)
  (attended_BTD,) = back_to_mixed(gradient_BTD)
  entered_BTD = attended_BTD + back_to_enter(attended_BTD)[0]
  normed = Norm(c.norm, c.norm_eps, model.dtype).apply({"params": params["input_layernorm"]}, x_BTD)

  def said(told: MixerConfig) -> jax.Array:
    mixer = mixer_class(told.mixer)(c, told, model.dtype)
    out: Any = mixer.apply({"params": params[MIXER]}, normed, None, context, method="outputs")
    return out[0]["o_proj"].reshape(*tokens_BT.shape, c.num_kv_heads, -1)

  whole = said(layer)
  kernel = params[MIXER]["o_proj"]["kernel"].reshape(c.num_kv_heads, -1, c.hidden_size)
  behind_BTGF = jnp.einsum("btd,gfd->btgf", at_least_float32(attended_BTD), kernel)
  lost = []
  for choice in choices:
    nats_BTG = jnp.einsum("btgf,btgf->btg", at_least_float32(whole - said(choice)), behind_BTGF)
    lost.append(jnp.sum(nats_BTG**2, axis=(0, 1)) / (2 * count_targets(batch)))
  return entered_BTD, constrain(jnp.stack(lost, axis=-1), None, None)  # whole on each process


def allotted(errors: np.ndarray, sizes: Sequence[int], tokens: float, *, patterns: int, repeats: int = 1) -> Allotment:
  """Returns what each head retains: the least error with at most `tokens` tokens a head on average.

  For a price a token, the patterns are found by local search, and the price by bisection. What then is left of the
  tokens buys the steps to larger patterns that gain most for each token.

  Args:
    errors: [L, G, sizes].
    sizes: numbers of tokens that a head may retain, increasing.
    tokens: number that a head may retain on average.
    patterns: number of patterns, at most.
    repeats: number by which the heads of each size can be divided, such as the mesh's axis `tensor`; divides G.

  Raises:
    ValueError: not even the smallest size fits, or `repeats` does not divide G.
  """
  layers, heads, _ = errors.shape
  if heads % repeats:
    raise ValueError(f"repeats={repeats}: wanted a divisor of {heads} heads.")
  places = max(n for n in range(1, min(heads // repeats, MOST_HEADS) + 1) if heads // repeats % n == 0)
  known = np.array(
    [
      pattern
      for pattern in itertools.combinations_with_replacement(range(len(sizes)), places)
      if len(set(pattern)) <= MOST_SIZES
    ]
  )
  held = np.asarray(sizes)[known].sum(axis=1)
  room = tokens * places * layers
  if held.min() * layers > room:
    raise ValueError(f"{tokens:.0f} retained tokens a head: wanted {min(sizes)} or more.")
  copies = heads // places
  assigned = np.array([[_assigned(errors[i], pattern, copies)[1] for pattern in known] for i in range(layers)])

  def total(path: np.ndarray) -> tuple[float, int]:
    return assigned[np.arange(layers), path].sum(), held[path].sum()

  fit = np.flatnonzero(held * layers <= room)
  best = np.full(layers, fit[assigned[:, fit].sum(axis=0).argmin()])  # of one pattern
  low, high = 0.0, float((assigned.max() - assigned.min()) * layers)
  for _ in range(60):
    price = (low + high) / 2
    path = _few(assigned + price * held, patterns)
    if total(path)[1] <= room:
      high = price
      best = min(best, path, key=lambda path: total(path)[0])
    else:
      low = price
  best = _spent(best, assigned, held, room, patterns)
  orders = [_assigned(errors[i], known[j], copies)[0] for i, j in enumerate(best)]
  return Allotment(np.asarray(sizes)[known[best]], np.array(orders), float(total(best)[0]))


def _assigned(errors: np.ndarray, pattern: np.ndarray, copies: int) -> tuple[np.ndarray, float]:
  """Returns (the heads in the order of the places of all repeats of a pattern, the sum of their errors)."""
  places = np.tile(pattern, copies)
  _, heads = linear_sum_assignment(errors[:, places].T)
  return heads, float(errors[heads, places].sum())


def _few(costs: np.ndarray, patterns: int) -> np.ndarray:
  """Returns the pattern of each layer, with at most so many of them in use, such that costs [L, all patterns] are low.

  Patterns are added one by one, then exchanged for others one by one, as long as that lowers the costs.
  """
  layers = len(costs)
  used: list[int] = []

  def best_with(others: list[int]) -> tuple[float, int]:
    least = costs[:, others].min(axis=1) if others else np.full(layers, np.inf)
    sums = np.minimum(least[:, None], costs).sum(axis=0)
    return sums.min(), int(sums.argmin())

  for _ in range(min(patterns, layers)):
    cost, found = best_with(used)
    used.append(found)
  while True:
    exchanges = [(*best_with(used[:i] + used[i + 1 :]), i) for i in range(len(used))]
    least, found, i = min(exchanges)
    if least >= cost * (1 - 1e-12):
      return np.array(used)[costs[:, used].argmin(axis=1)]
    cost, used[i] = least, found


def _spent(path: np.ndarray, errors: np.ndarray, held: np.ndarray, room: float, patterns: int) -> np.ndarray:
  """Returns a path with larger patterns, of layers alone or of all that have the same, as long as there is room."""
  while True:
    left, most, step = room - held[path].sum(), 0.0, None
    used = np.unique(path)
    alone = used if len(used) >= patterns else np.arange(len(held))
    groups = [(np.flatnonzero(path == now), np.arange(len(held))) for now in used]
    for layers, others in [*groups, *((np.array([i]), alone) for i in range(len(path)))]:
      now = path[layers[0]]
      costs = (held[others] - held[now]) * len(layers)
      gains = errors[layers, now].sum() - errors[np.ix_(layers, others)].sum(axis=0)
      worth = np.where((costs > 0) & (costs <= left), gains / np.maximum(costs, 1), 0)
      if worth.max() > most:
        most, step = worth.max(), (layers, int(others[worth.argmax()]))
    if step is None:
      return path
    path[step[0]] = step[1]


def with_order(attention: Mapping[str, Any], order: Sequence[int], config: ModelConfig) -> dict[str, Any]:
  """Returns the parameters of an attention whose key/value heads are in another order; it computes the same.

  Args:
    attention: parameters of a softmax attention.
    order: order[i] is the head that becomes head i.
    config: config of the model.
  """

  def moved(x: jax.Array, axis: int) -> jax.Array:
    x = jnp.moveaxis(x, axis, 0)
    x = x.reshape(config.num_kv_heads, -1, *x.shape[1:])[jnp.asarray(order)].reshape(x.shape)
    return jnp.moveaxis(x, 0, axis)

  axes = {"q_proj": -1, "k_proj": -1, "v_proj": -1, "o_proj": 0}
  found: dict[str, Any] = {}
  for name, tree in attention.items():
    whole = name in ("q_proj_norm", "k_proj_norm") and config.qk_norm == "all_heads"
    found[name] = {
      part: moved(x, axes.get(name, -1)) if whole or (name in axes and (part, name) != ("bias", "o_proj")) else x
      for part, x in tree.items()
    }
  return found
