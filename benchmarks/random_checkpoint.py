"""Writes random Hugging Face checkpoints of any size, one tensor at a time; for tests and benchmarks."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from supra_jax.core.plain_json import to_json
from supra_jax.model.config import ModelConfig


def hf_shape(config: ModelConfig) -> dict[str, Any]:
  """Returns the arguments of transformers' LlamaConfig or MistralConfig that give a model the shape of ours."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "tie_word_embeddings": config.tie_embeddings,
    "attn_implementation": "sdpa",
  }


def write(directory: Path, **config) -> Path:
  """Makes a directory with a Llama, Mistral or Qwen3 in bfloat16, config.json and model.safetensors, and no tokenizer.

  The weights are 2^22 normal numbers with standard deviation 0.02, repeated; those of norms are 1 more.

  Args:
    directory: directory to make.
    **config: keys of config.json.

  Returns:
    Path of the file with the weights.
  """
  directory.mkdir()
  config = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | config
  (directory / "config.json").write_text(to_json(config))
  header, end = {}, 0
  for name, shape in _shapes(**config).items():
    begin, end = end, end + 2 * int(np.prod(shape))
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
  noise = (0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)).astype(ml_dtypes.bfloat16)
  raw, path = to_json(header).encode(), directory / "model.safetensors"
  with path.open("wb") as file:
    file.write(len(raw).to_bytes(8, "little") + raw)
    for number, (name, entry) in enumerate(header.items()):
      values = np.resize(np.roll(noise, number), int(np.prod(entry["shape"])))
      file.write((values + values.dtype.type(1) if name.endswith("norm.weight") else values).tobytes())
  return path


def _shapes(
  *, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
  tie_word_embeddings, model_type=None, head_dim=None, **_,
):  # fmt: skip
  head_dim = head_dim or hidden_size // num_attention_heads
  wide, narrow = head_dim * num_attention_heads, head_dim * num_key_value_heads
  layer = {
    "input_layernorm": (hidden_size,),
    "self_attn.q_proj": (wide, hidden_size),
    "self_attn.k_proj": (narrow, hidden_size),
    "self_attn.v_proj": (narrow, hidden_size),
    "self_attn.o_proj": (hidden_size, wide),
    **(dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (head_dim,)) if model_type == "qwen3" else {}),
    "post_attention_layernorm": (hidden_size,),
    "mlp.gate_proj": (intermediate_size, hidden_size),
    "mlp.up_proj": (intermediate_size, hidden_size),
    "mlp.down_proj": (hidden_size, intermediate_size),
  }
  return {
    "model.embed_tokens.weight": (vocab_size, hidden_size),
    **{f"model.layers.{i}.{name}.weight": s for i in range(num_hidden_layers) for name, s in layer.items()},
    "model.norm.weight": (hidden_size,),
    **({} if tie_word_embeddings else {"lm_head.weight": (vocab_size, hidden_size)}),
  }
