"""The matrix of a layer's weights: how much of the value of token j each head puts into its output at token i.

Of softmax attention the matrix is `A = softmax(q k^T / sqrt(K))` over the tokens that a token sees; each row sums to 1.
Of SUPRA's linear attention it is, before the GroupNorm,

  L_ij = gamma^(i-j) (q_i . k_j) / sqrt(K) for j <= i, with q, k = RoPE(phi(W_q x)), RoPE(phi(W_k x)),

and of linear attention with a normaliser it is that matrix with each row divided by the row's normaliser. All of them
are 0 above the diagonal.

No equation of a mixer is written here a second time. The output of such a layer is a matrix times the values, so that
with the identity matrix as values the mixer's own code returns the matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.sharding import on_mesh
from supra_jax.inference.lm import LM
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Norm
from supra_jax.model.mixers.base import Context
from supra_jax.model.mixers.supra import head_slopes, read_linearly
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer


@dataclasses.dataclass(frozen=True)
class LayerMatrices:
  """The matrices of one layer, each computed when it is asked for.

  Attributes:
    layer: index of the layer.
    mixer: name of the layer's mixer.
    num_texts: number of texts that the model has read.
    read: function of the index of a text that returns the matrices of all heads; see `of`.
  """

  layer: int
  mixer: str
  num_texts: int
  read: Callable[[int], jax.Array]

  @property
  def exist(self) -> bool:
    """Whether the layer's mixer has such a matrix."""
    return self.mixer in _MATRICES

  def of(self, text: int) -> np.ndarray:
    """Returns the matrices of one text, float32 [H, T, T]; row i has the weights of the output at token i.

    Args:
      text: index of the text, 0 to `num_texts` - 1.

    Raises:
      ValueError: the layer's mixer has no such matrix.
      IndexError: there is no such text.
    """
    if not self.exist:
      raise ValueError(f"Layer {self.layer} is {self.mixer!r}: wanted a mixer of {', '.join(_MATRICES)}.")
    if not 0 <= text < self.num_texts:
      raise IndexError(f"text={text}: wanted 0 to {self.num_texts - 1}.")
    return np.asarray(self.read(text))


def attention_matrices(lm: LM, tokens_BT: np.ndarray, layers: Collection[int] | None = None) -> Iterator[LayerMatrices]:
  """Yields the matrices of a model's layers, one layer at a time, in float32 whatever the parameters' dtype is.

  The model reads each text from its beginning, as one document. What is held at a time are the activations
  [T, D] that enter a layer, of all texts, and a matrix [H, T, T] of one text where one is asked for.

  Args:
    lm: the model. Its layers may have any mixers, also those without such a matrix.
    tokens_BT: int [B, T], tokens of B texts.
    layers: indices of the layers to yield, in any order; None: all.

  Returns:
    An iterator over the layers, the first layer first.
  """
  config, params = lm.config, lm.params
  chosen = range(config.num_layers) if layers is None else sorted(layers)
  embed = functools.partial(_embed, config, params)
  with on_mesh(lm.mesh):
    streams = [embed(jnp.asarray(tokens_1T, jnp.int32)) for tokens_1T in np.asarray(tokens_BT)[:, None]]
  for i in range(max(chosen, default=-1) + 1):
    layer, own = config.layers[i], params[f"layers_{i}"]
    if i in chosen:

      def read(text: int, layer=layer, own=own, streams=tuple(streams)) -> jax.Array:
        with on_mesh(lm.mesh):
          return _matrices(config, layer, own, streams[text])

      yield LayerMatrices(i, layer.mixer, len(streams), read)
    if i != max(chosen):
      with on_mesh(lm.mesh):
        streams = [_block(config, layer, own, x_1TD) for x_1TD in streams]


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: ModelConfig, params: Mapping[str, Any], tokens_1T: jax.Array) -> Any:
  return Transformer(config).apply({"params": params}, tokens_1T, method="embed")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(config: ModelConfig, layer: MixerConfig, params: Mapping[str, Any], x_1TD: jax.Array) -> jax.Array:
  """Returns the activations that leave a layer; layers of one config share the compiled program."""
  with jax.default_matmul_precision("highest"):
    x_1TD, _ = Block(config, layer).apply({"params": params}, x_1TD, None, _context(config, x_1TD))
  return x_1TD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _matrices(config: ModelConfig, layer: MixerConfig, params: Mapping[str, Any], x_1TD: jax.Array) -> jax.Array:
  """Returns the matrices of a layer, float32 [H, T, T], given the activations that enter it."""
  with jax.default_matmul_precision("highest"):
    norm = {"params": params["input_layernorm"]}
    normed: Any = Norm(config.norm, config.norm_eps).apply(norm, x_1TD)
    # By name: on accelerators `auto` may choose a kernel that refuses values as wide as a text is long.
    mixer = mixer_class(layer.mixer)(config, layer, implementation="chunked_xla")
    told = {"params": params[MIXER]}, normed, _context(config, x_1TD)
    weights_1THT: Any = mixer.apply(*told, method=_MATRICES[layer.mixer])
  return weights_1THT[0].transpose(1, 0, 2)


def _context(config: ModelConfig, x_1TD: jax.Array) -> Context:
  return Transformer(config).place(jnp.zeros(x_1TD.shape[:2], jnp.int32))[0]


def _identity(v_1TGV: jax.Array) -> jax.Array:
  """Returns the identity matrix in place of the values of each key/value head, [1, T, G, T]."""
  time, groups = v_1TGV.shape[1:3]
  return jnp.broadcast_to(jnp.eye(time, dtype=v_1TGV.dtype)[:, None], (1, time, groups, time))


def _of_outputs(mixer: Any, x_1TD: jax.Array, context: Context) -> jax.Array:
  """Returns what the output projection of a mixer would read if the values were the identity, [1, T, H, T].

  It is the matrix of every mixer whose output before the output projection is a matrix times the values, and whose only
  output projection is `o_proj`.
  """

  def with_identity(method: Callable[..., Any], args: Any, kwargs: Any, called: nn.module.InterceptorContext) -> Any:
    found = method(*args, **kwargs)
    if called.module is not mixer or called.method_name != "project":
      return found
    q, k, v = found
    return q, k, _identity(v)

  with nn.intercept_methods(with_identity):
    outputs, _ = mixer.outputs(x_1TD, None, context)
  time = x_1TD.shape[1]
  weights_1THT: jax.Array = outputs["o_proj"].reshape(1, time, mixer.config.num_heads, time)
  return weights_1THT


def _before_group_norm(mixer: Any, x_1TD: jax.Array, context: Context) -> jax.Array:
  """Returns L of SUPRA's linear attention, [1, T, H, T], as `LinearProjections.attend_linearly` has it inside."""
  q, k, v = mixer.project(x_1TD)
  q, k = mixer.features(q, k, context)
  slopes = jnp.asarray(head_slopes(mixer.layer, mixer.config.num_heads))
  how: dict[str, Any] = {"scale": mixer.config.head_dim**-0.5, "implementation": mixer.implementation}
  weights_1THT, _ = read_linearly(q, k, _identity(v), slopes, None, context, **how)
  return weights_1THT


# Mixer -> function of (module, its input [1, T, D], context) that returns the matrices [1, T, H, T].
_MATRICES: dict[str, Callable[[Any, jax.Array, Context], jax.Array]] = {
  "softmax": _of_outputs,
  "t2r": _of_outputs,
  "linear_transformer": _of_outputs,
  "supra": _before_group_norm,
  # Of its linear attention alone: the softmax over the window has a matrix, and an output projection, of its own.
  "supra_window": _before_group_norm,
}
