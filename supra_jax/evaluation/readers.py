"""Models that read the same text, to be compared: a model, its teacher, and the teacher with a window of few tokens.

What a state is worth is judged beside the simplest state of as many bytes: the teacher's own keys and values of the
last tokens. `window_only` is the teacher with such a window in all layers; nothing of it is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supra_jax.core.sharding import on_mesh
from supra_jax.inference import decode
from supra_jax.inference.lm import LM
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import state_bytes_by_part
from supra_jax.model.finite import not_finite
from supra_jax.model.mixers.lolcats import LolcatsConfig
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.softmax import SoftmaxConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.placement import placed
from supra_jax.model.registry import MIXER, MixerConfig
from supra_jax.model.shapes import parameter_shapes
from supra_jax.model.transformer import DecodeState, Transformer
from supra_jax.objectives.heldout import token_nll

MODEL, TEACHER, EQUAL, OWN = "model", "teacher", "window of equal bytes", "own window"
# Fields of the config of a linear attention whose parameters are all 0.
_LINEAR: dict[str, Any] = {"feature_map": "per_head", "decay": "none", "qk_norm": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """A model, and the dtype in which its state holds keys and values.

  Attributes:
    model: the Flax module; `model.state_dtype` is the dtype of keys and values.
    params: parameters of the model.
    mesh: the mesh that the parameters are on; None: one device.
    unused: parts of the state that are always 0, and count no bytes.
  """

  model: Transformer
  params: Mapping[str, Any]
  mesh: Mesh | None = None
  unused: frozenset[str] = frozenset()

  @property
  def config(self) -> ModelConfig:
    return self.model.config

  def fresh(self, rows: int, tokens: int) -> DecodeState:
    """Returns the state before any token, of texts of at most so many tokens."""
    return placed(self.model.init_state(rows, decode.capacity_for(tokens)), self.config, self.mesh)

  def bytes(self, tokens: int) -> int:
    """Returns the bytes that the state of one text of so many tokens holds."""
    return sum(self.bytes_by_part(tokens).values())

  def bytes_by_part(self, tokens: int) -> dict[str, int]:
    """Returns {part: bytes} of the state, summed over all layers."""
    parts = state_bytes_by_part(self.config, tokens, self.model.state_dtype)
    return {part: size for part, size in parts.items() if part not in self.unused}

  def read(self, tokens_BT: np.ndarray, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Reads a text in pieces; returns (activations after the last token [B, D], the state). The state is donated."""
    with on_mesh(self.mesh):
      return decode.prefill(self.model, self.params, np.asarray(tokens_BT, np.int32), state)

  def losses(self, rows_BT: np.ndarray, state: DecodeState | None = None) -> np.ndarray:
    """Returns the negative log-likelihood of each token of a row but the first, float32 [B, T - 1], in nats.

    Args:
      rows_BT: token ids.
      state: what was read before the rows; donated. None: nothing.

    Raises:
      NotFiniteError: logits are not finite.
    """
    rows_BT = np.asarray(rows_BT, np.int32)
    time = rows_BT.shape[1] - 1
    held: DecodeState | None = self.fresh(*rows_BT.shape) if state is None else state
    width = min(time, decode.PREFILL_TOKENS)
    found = []
    with on_mesh(self.mesh):
      for start in range(0, time, width):
        count = min(width, time - start)  # the last piece is padded, so that all share a program
        piece = np.pad(rows_BT[:, start : start + count + 1], ((0, 0), (0, width - count)))
        losses, held = token_nll(self.model, self.params, piece, held, np.full(len(rows_BT), count, np.int32))
        found.append(np.asarray(losses)[:, :count])
    losses_BT = np.concatenate(found, axis=1)
    if not np.isfinite(losses_BT).all():
      raise not_finite(self.model, self.params, rows_BT[:, :-1].tolist() if state is None else [])
    return losses_BT


def reader(lm: LM, state_dtype: Any = None) -> Reader:
  """Returns the model of an `LM`, with keys and values of its state in a dtype; None: that of the computation."""
  dtype = lm.model.dtype if state_dtype is None else jnp.dtype(state_dtype)
  return Reader(lm.model.clone(state_dtype=dtype), lm.params, lm.mesh)


def window_only(teacher: Reader, layers: Sequence[MixerConfig]) -> Reader:
  """Returns the teacher with a window of its own softmax attention in place of all it has read.

  Args:
    teacher: a transformer whose layers are all softmax layers.
    layers: the window and sinks of each layer, a WindowConfig, whose linear attention is left out; or a SoftmaxConfig
      for a layer that stays as it is.
  """
  layers = tuple(
    dataclasses.replace(layer, **_LINEAR) if isinstance(layer, WindowConfig) else layer for layer in layers
  )
  model = teacher.model.clone(config=teacher.config.replace(layers=layers))
  params, shapes = dict(teacher.params), parameter_shapes(model)
  for name, layer in params.items():
    if name.startswith("layers_"):
      missing = {key: tree for key, tree in shapes[name][MIXER].items() if key not in layer[MIXER]}
      # Without phi and W_l, the output of the linear attention is 0.
      nothing = jax.tree.map(lambda x: np.zeros(x.shape, model.dtype), missing)
      params[name] = {**layer, MIXER: {**layer[MIXER], **nothing}}
  return Reader(model, params, teacher.mesh, frozenset({"linear"}))


def equal_window(model: Reader, teacher: Reader, tokens: int, sinks: int | None = None) -> WindowConfig:
  """Returns the window whose keys and values, sinks included, are no more bytes than the state of a model.

  Args:
    model: the model.
    teacher: its teacher.
    tokens: length of a text, for models whose state grows.
    sinks: number of first tokens among those that the window holds; None: as many as the model's own layers have, or
      else `WindowConfig.sinks`. There are none if the window would be smaller than twice as many.

  Raises:
    ValueError: the state has fewer bytes than one token's keys and values.
  """
  one = teacher.bytes(1)
  count = model.bytes(tokens) // one
  if count < 1:
    raise ValueError(f"The state has {model.bytes(tokens)} bytes: fewer than the keys and values of a token, {one}.")
  if sinks is None:
    own = [layer.sinks for layer in model.config.layers if isinstance(layer, WindowConfig)]
    sinks = min(own, default=WindowConfig.sinks)
  sinks = sinks if count >= 2 * sinks else 0
  return WindowConfig(window=count - sinks, sinks=sinks)


def readers(
  lm: LM, teacher: LM, tokens: int, *, state_dtype: Any = "bfloat16", sinks: int | None = None
) -> dict[str, Reader]:
  """Returns the models to compare, by name: MODEL, TEACHER, EQUAL, and OWN if the model has windows in all layers.

  Args:
    lm: the model.
    teacher: the transformer that it was made of.
    tokens: length of a text, which counts where the state grows with the text.
    state_dtype: dtype in which all of them hold keys and values.
    sinks: see `equal_window`.

  Raises:
    ValueError: the teacher is no transformer, or the vocabularies differ.
  """
  if set(teacher.config.mixers) != {SoftmaxConfig.mixer}:
    raise ValueError(
      f"The teacher has layers of {', '.join(sorted(set(teacher.config.mixers)))}: wanted softmax alone."
    )
  if (lm.config.vocab_size, lm.config.num_layers) != (teacher.config.vocab_size, teacher.config.num_layers):
    raise ValueError("The teacher has another vocabulary or number of layers: wanted the model's own teacher.")
  ours, theirs = reader(lm, state_dtype), reader(teacher, state_dtype)
  equal = equal_window(ours, theirs, tokens, sinks)
  made = {MODEL: ours, TEACHER: theirs, EQUAL: window_only(theirs, (equal,) * theirs.config.num_layers)}
  layers = lm.config.layers
  if any(isinstance(x, WindowConfig) for x in layers) and all(
    isinstance(x, WindowConfig | SoftmaxConfig) for x in layers
  ):
    made[OWN] = window_only(theirs, layers)
  return made


def last_tokens(reader: Reader) -> int:
  """Returns the number of last tokens that the largest of a model's windows holds; 0 if there is none."""
  return max((layer.window for layer in reader.config.layers if isinstance(layer, WindowConfig)), default=0)


def reach(reader: Reader) -> int | None:
  """Returns how far softmax attention sees through all layers, the sum of their windows; None: without limit."""
  seen = 0
  for layer in reader.config.layers:
    if isinstance(layer, SoftmaxConfig):
      if reader.config.sliding_window is None:
        return None
      seen += reader.config.sliding_window
    elif isinstance(layer, WindowConfig | LolcatsConfig):
      seen += layer.window
    elif isinstance(layer, MemoryConfig):
      seen += layer.window + layer.chunk  # retained tokens may be from anywhere
  return seen


def described(reader: Reader, tokens: int) -> dict[str, Any]:
  """Returns what a model remembers a text of so many tokens in: bytes of the state, mixers, windows and sinks."""
  windows = [layer for layer in reader.config.layers if isinstance(layer, WindowConfig)]
  return {
    "state_bytes": reader.bytes(tokens),
    "keys_and_values": jnp.dtype(reader.model.state_dtype).name,
    "mixers": {name: reader.config.mixers.count(name) for name in dict.fromkeys(reader.config.mixers)},
    "windows": sorted({layer.window for layer in windows}),
    "sinks": sorted({layer.sinks for layer in windows}),
    "reach": reach(reader),
  }
