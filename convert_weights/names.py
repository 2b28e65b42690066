"""Our parameters and their names in other formats: one table for Hugging Face, GGUF and OpenLM."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from convert_weights import mamba
from convert_weights.errors import ConversionError
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.mamba import MambaConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.registry import MixerConfig

EMBEDDING = ("embed_tokens", "embedding")
HF_UNEMBEDDING = "lm_head.weight"
GGUF_UNEMBEDDING = "output.weight"
OPENLM_EMBEDDING = "tok_embeddings.weight"
OPENLM_UNEMBEDDING = "output.weight"


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter of ours and the tensor that holds it in each format.

  Attributes:
    path: path of the parameter in our parameter tree.
    shape: shape of the parameter in our layout.
    hf: name of the tensor in transformers. A parameter that transformers does not have is named by the same scheme.
    gguf, openlm: name of the tensor in GGUF and in OpenLM (without a prefix such as `model.`); None if the format
      cannot store the parameter.
    openlm_row: the parameter's first row in OpenLM's tensor, which may hold the rows of several parameters.
    transposed: whether other formats store the tensor as [..., out, in], while ours is [..., in, out].
    rotary_heads: number of heads that RoPE rotates in the output features, which GGUF permutes; None if RoPE does not
      rotate them.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  hf: str
  gguf: str | None = None
  openlm: str | None = None
  openlm_row: int = 0
  transposed: bool = False
  rotary_heads: int | None = None

  @property
  def source_shape(self) -> tuple[int, ...]:
    """Shape of the parameter in the layout of other formats."""
    return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


def parameters(config: ModelConfig) -> list[Parameter]:
  """Returns every parameter of a model, embedding first.

  Raises:
    ConversionError: a layer's mixer has no names in other formats.
  """
  c = config
  if mamba.is_mamba(c):
    return list(_mamba(c))
  embedding = _Module(EMBEDDING[:1], "model.embed_tokens", "token_embd", "tok_embeddings")
  result = [embedding.parameter(EMBEDDING[1], (c.vocab_size, c.hidden_size))]
  if c.post_embed_norm:
    result += _norm(c, _Module(("post_embed_norm",), "model.post_embed_norm", None, "post_embed_norm"), c.hidden_size)
  for number, layer in enumerate(c.layers):
    result += _layer(c, number, layer)
  result += _norm(c, _Module(("norm",), "model.norm", "output_norm", "norm"), c.hidden_size)
  if not c.tie_embeddings:
    unembedding = _Module(("lm_head",), "lm_head", "output", "output")
    result.append(unembedding.parameter("kernel", (c.hidden_size, c.vocab_size), transposed=True))
  return result


def openlm_shapes(table: Sequence[Parameter]) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of OpenLM's tensors. The rows of q, k and v share one tensor, those of gate and up one."""
  shapes: dict[str, tuple[int, ...]] = {}
  for parameter in table:
    if parameter.openlm is not None:
      rows, *rest = parameter.source_shape
      shapes[parameter.openlm] = (parameter.openlm_row + rows, *rest)
  return shapes


class _Module(NamedTuple):
  """A module of ours, its name in each format, and its first row in OpenLM's tensor."""

  path: tuple[str, ...]
  hf: str
  gguf: str | None = None
  openlm: str | None = None
  openlm_row: int = 0

  def parameter(self, leaf: str, shape: tuple[int, ...], **how: Any) -> Parameter:
    name = "bias" if leaf == "bias" else "weight"
    gguf, openlm = (other and f"{other}.{name}" for other in (self.gguf, self.openlm))
    return Parameter((*self.path, leaf), shape, f"{self.hf}.{name}", gguf, openlm, self.openlm_row, **how)


def _norm(config: ModelConfig, module: _Module, width: int) -> Iterator[Parameter]:
  yield module.parameter("weight", (width,))
  if config.norm == "layer_norm":
    yield module.parameter("bias", (width,))


def _layer(config: ModelConfig, number: int, layer: MixerConfig) -> Iterator[Parameter]:
  c, mixer = config, layer.mixer
  if mixer not in ("softmax", "supra", "supra_window", "memory", "lolcats", "t2r", "linear_transformer"):
    raise ConversionError(f"Layer {number} is a {mixer!r} layer, which has no names in other formats.")
  h, g = c.num_heads, c.num_kv_heads
  q, k, v = h * c.head_dim, g * c.head_dim, g * c.value_width

  def module(ours: str, gguf: str | None, openlm: str | None, row: int = 0) -> _Module:
    path, openlm = (f"layers_{number}", *ours.split(".")), openlm and f"layers.{number}.{openlm}"
    return _Module(path, f"model.layers.{number}.{ours}", gguf and f"blk.{number}.{gguf}", openlm, row)

  def dense(
    module: _Module, inputs: int, outputs: int, has_bias: bool, heads: int | None = None
  ) -> Iterator[Parameter]:
    yield module.parameter("kernel", (inputs, outputs), transposed=True, rotary_heads=heads)
    if has_bias:  # OpenLM has no biases
      yield module._replace(openlm=None).parameter("bias", (outputs,), rotary_heads=heads)

  yield from _norm(c, module("input_layernorm", "attn_norm", "attention_norm"), c.hidden_size)
  in_proj = "attention.in_proj"
  yield from dense(module("self_attn.q_proj", "attn_q", in_proj), c.hidden_size, q, c.qkv_bias, h)
  yield from dense(module("self_attn.k_proj", "attn_k", in_proj, q), c.hidden_size, k, c.qkv_bias, g)
  yield from dense(module("self_attn.v_proj", "attn_v", in_proj, q + k), c.hidden_size, v, c.qkv_bias)
  out_proj = module("self_attn.o_proj", "attn_output", "attention.out_proj")
  yield from dense(out_proj, h * c.value_width, c.hidden_size, c.output_bias)
  for name, width in (("q", q), ("k", k)) if c.qk_norm != "none" else ():
    # OpenLM has this norm in softmax attention only, over all heads. Its linear attention has norms after phi (below).
    openlm = f"attention.{name}_norm" if (c.qk_norm, mixer) == ("all_heads", "softmax") else None
    norm = module(f"self_attn.{name}_proj_norm", f"attn_{name}_norm" if c.qk_norm == "head" else None, openlm)
    norm = norm._replace(hf=norm.hf.replace("_proj_norm", "_norm"))  # the name in Qwen3
    yield from _norm(c, norm, c.head_dim if c.qk_norm == "head" else width)
  if mixer == "supra_window":
    yield from dense(module("self_attn.linear_o_proj", None, None), h * c.value_width, c.hidden_size, False)
  if mixer == "lolcats":
    for name, heads in (("hedgehog_q", h), ("hedgehog_k", g)):
      matrices = (heads, c.head_dim, c.head_dim)
      yield module(f"self_attn.{name}", None, None).parameter("kernel", matrices, transposed=True)
    yield module("self_attn.window_factor", None, None).parameter("weight", (h,))
  if isinstance(layer, SupraConfig):
    for name, shape in _feature_maps(c, layer).items():
      openlm = f"attention.{name.replace('feature_map', '_totrain_embed')}" if layer.feature_map == "dense" else None
      feature_map = module(f"self_attn.{name}", None, openlm)
      yield feature_map.parameter("kernel", shape, transposed=True)
      yield feature_map.parameter("bias", shape[:-1])
    for name in ("q", "k") if layer.qk_norm else ():
      norm = module(f"self_attn.{name}_norm", None, f"attention._totrain_{name}_norm")
      # Another name than that of Qwen3's norm, which comes before phi.
      norm = norm._replace(hf=norm.hf.replace("_norm", "_feature_norm"))
      yield from _norm(c, norm, q)

  yield from _norm(c, module("post_attention_layernorm", "ffn_norm", "ffn_norm"), c.hidden_size)
  w12, ffn = "feed_forward.w12", c.intermediate_size
  yield from dense(module("mlp.gate_proj", "ffn_gate", w12), c.hidden_size, ffn, c.mlp_bias)
  yield from dense(module("mlp.up_proj", "ffn_up", w12, ffn), c.hidden_size, ffn, c.mlp_bias)
  yield from dense(module("mlp.down_proj", "ffn_down", "feed_forward.w3"), ffn, c.hidden_size, c.mlp_bias)


def _mamba(config: ModelConfig) -> Iterator[Parameter]:
  """Yields the parameters of a model of Mamba's blocks alone, which transformers has a class for."""
  c, told = config, config.layers[0]
  assert isinstance(told, MambaConfig)
  width, channels, rank = c.hidden_size, told.channels(c.hidden_size), told.rank(c.hidden_size)
  yield Parameter(EMBEDDING, (c.vocab_size, width), mamba.EMBEDDING)
  for number in range(c.num_layers):
    ours, theirs = (f"layers_{number}", "self_attn"), f"backbone.layers.{number}"
    yield Parameter((ours[0], "input_layernorm", "weight"), (width,), f"{theirs}.norm.weight")
    for name, shape, has_bias in (
      ("in_proj", (width, 2 * channels), told.use_bias),
      ("x_proj", (channels, rank + 2 * told.state_size), False),
      ("dt_proj", (rank, channels), True),
      ("out_proj", (channels, width), told.use_bias),
    ):
      yield Parameter((*ours, name, "kernel"), shape, f"{theirs}.mixer.{name}.weight", transposed=True)
      if has_bias:
        yield Parameter((*ours, name, "bias"), shape[1:], f"{theirs}.mixer.{name}.bias")
    yield Parameter((*ours, "conv1d", "kernel"), (channels, 1, told.conv_kernel), f"{theirs}.mixer.conv1d.weight")
    if told.use_conv_bias:
      yield Parameter((*ours, "conv1d", "bias"), (channels,), f"{theirs}.mixer.conv1d.bias")
    yield Parameter((*ours, "a_log", "weight"), (channels, told.state_size), f"{theirs}.mixer.A_log")
    yield Parameter((*ours, "skip", "weight"), (channels,), f"{theirs}.mixer.D")
  yield Parameter(("norm", "weight"), (width,), "backbone.norm_f.weight")
  if not c.tie_embeddings:
    yield Parameter(("lm_head", "kernel"), (width, c.vocab_size), HF_UNEMBEDDING, transposed=True)


def _feature_maps(config: ModelConfig, layer: SupraConfig) -> dict[str, tuple[int, ...]]:
  """Returns name -> kernel shape [..., in, out] of each feature map phi; the bias has the shape [..., in]."""
  h, g, k = config.num_heads, config.num_kv_heads, config.head_dim
  match layer.feature_map:
    case "dense":
      own = {} if g == h else {"feature_map_kv": (g * k, g * k)}
      return {"feature_map": (h * k, h * k), **own}
    case "per_head":
      return {"feature_map": (g, k, k)}
    case "per_head_separate":
      return {"feature_map": (h, k, k), "feature_map_kv": (g, k, k)}
  typing.assert_never(layer.feature_map)
