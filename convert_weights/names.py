"""Our parameters and what others call them: one table for Hugging Face and GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from convert_weights.errors import ConversionError, listing
from supra_jax.config import ModelConfig

HF_EMBEDDING = "model.embed_tokens.weight"
HF_UNEMBEDDING = "lm_head.weight"
GGUF_UNEMBEDDING = "output.weight"

_ATTENTION_GGUF = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP_GGUF = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter of ours and the tensor it comes from.

  Attributes:
    path: where it lies in our tree.
    shape: its shape there.
    hf, gguf: the tensor's names.
    transposed: the tensor is stored [out, in], ours is [in, out].
    rotary_heads: how many rotated heads its output features hold; GGUF permutes those features. None: none.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  hf: str
  gguf: str
  transposed: bool = False
  rotary_heads: int | None = None

  @property
  def source_shape(self) -> tuple[int, ...]:
    return self.shape[::-1] if self.transposed else self.shape


def parameters(config: ModelConfig) -> list[Parameter]:
  """Every parameter of a softmax model, embedding first."""
  embedding = Parameter(
    ("embed_tokens", "embedding"),
    (config.vocab_size, config.hidden_size),
    HF_EMBEDDING,
    "token_embd.weight",
  )
  result = [embedding]
  for layer in range(config.num_layers):
    result += _layer_parameters(config, layer)
  result.append(Parameter(("norm", "weight"), (config.hidden_size,), "model.norm.weight", "output_norm.weight"))
  if not config.tie_embeddings:
    shape = (config.hidden_size, config.vocab_size)
    result.append(Parameter(("lm_head", "kernel"), shape, HF_UNEMBEDDING, GGUF_UNEMBEDDING, transposed=True))
  return result


def _layer_parameters(config: ModelConfig, layer: int) -> Iterator[Parameter]:
  ours, hf, gguf = f"layers_{layer}", f"model.layers.{layer}", f"blk.{layer}"
  d, h, g = config.hidden_size, config.num_heads, config.num_kv_heads
  for norm, gguf_norm in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
    yield Parameter((ours, norm, "weight"), (d,), f"{hf}.{norm}.weight", f"{gguf}.{gguf_norm}.weight")
  widths = {
    ("self_attn", "q_proj"): (d, h * config.head_dim),
    ("self_attn", "k_proj"): (d, g * config.head_dim),
    ("self_attn", "v_proj"): (d, g * config.value_width),
    ("self_attn", "o_proj"): (h * config.value_width, d),
    ("mlp", "gate_proj"): (d, config.intermediate_size),
    ("mlp", "up_proj"): (d, config.intermediate_size),
    ("mlp", "down_proj"): (config.intermediate_size, d),
  }
  for (block, name), shape in widths.items():
    gguf_name = f"{gguf}.{(_ATTENTION_GGUF | _MLP_GGUF)[name]}"
    rotary_heads = {"q_proj": h, "k_proj": g}.get(name)
    path, hf_name = (ours, block, name), f"{hf}.{block}.{name}"
    yield Parameter((*path, "kernel"), shape, f"{hf_name}.weight", f"{gguf_name}.weight", True, rotary_heads)
    if config.mlp_bias if block == "mlp" else config.output_bias if name == "o_proj" else config.qkv_bias:
      yield Parameter((*path, "bias"), shape[1:], f"{hf_name}.bias", f"{gguf_name}.bias", False, rotary_heads)


def check_tensors(
  source: str,
  wanted: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  *,
  optional: Mapping[str, tuple[int, ...]],
  unreadable: Collection[str],
) -> None:
  """Holds the tensors a source has against those the config asks for.

  Args:
    source: what to call the source in a message.
    wanted: name -> shape of each tensor that must be there.
    found: name -> shape of each tensor that is there, ignored ones left out.
    optional: name -> shape of tensors that may be there besides.
    unreadable: a line for each tensor whose type cannot be read.

  Raises:
    ConversionError: the two differ; lists missing, unknown, mis-shaped and unreadable tensors.
  """
  known = {**optional, **wanted}
  lines = [
    *listing("missing tensors", (f"{name} {list(wanted[name])}" for name in wanted if name not in found)),
    *listing("unknown tensors", (f"{name} {list(found[name])}" for name in sorted(set(found) - set(known)))),
    *listing(
      "tensors of another shape than the config gives",
      (
        f"{name}: wanted {list(shape)}, got {list(found[name])}"
        for name, shape in known.items()
        if name in found and tuple(found[name]) != tuple(shape)
      ),
    ),
    *listing("tensors of a type that cannot be read", unreadable),
  ]
  if lines:
    raise ConversionError("\n".join([f"{source}: the tensors are not those its config describes.", *lines]))
