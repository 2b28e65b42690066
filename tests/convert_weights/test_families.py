"""Every family, tiny and random, against transformers' own code."""

import json

import numpy as np
import pytest
from tiny_checkpoints import read

from convert_weights import hf_config
from convert_weights.errors import ConversionError
from supra_jax.model.config import RopeConfig

SIZES = {
  "vocab_size": 97,
  "hidden_size": 48,
  "intermediate_size": 64,
  "num_hidden_layers": 1,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40))


@pytest.mark.parametrize(
  "model_type, settings, wanted",
  [
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    (
      "llama",
      {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0}},
      {"rope": RopeConfig(1e5, "linear", 3.0)},
    ),
    ("llama", {"rope_parameters": YARN, "tie_word_embeddings": True}, {"tie_embeddings": True}),
    (
      "mistral",
      {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 9.0}},
      {"sliding_window": 4096},
    ),
    ("mistral", {"rope_parameters": YARN | {"attention_factor": 0.8}, "sliding_window": 16}, {"sliding_window": 16}),
    ("qwen2", {}, {"qkv_bias": True, "output_bias": False, "sliding_window": None}),
    (
      "qwen2",
      {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9, "tie_word_embeddings": True},
      {"sliding_window": 9, "tie_embeddings": True},
    ),
    ("qwen3", {"head_dim": 16}, {"qk_norm": "head", "head_dim": 16, "qkv_bias": False}),
    (
      "qwen3",
      {"head_dim": 10, "attention_bias": True, "num_key_value_heads": 6, "rope_parameters": YARN},
      {"qk_norm": "head", "qkv_bias": True, "output_bias": True, "num_kv_heads": 6},
    ),
  ],
  ids=str,
)
@pytest.mark.usefixtures("quick_compilation")
def test_logits(tmp_path, model_type, settings, wanted):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config = transformers.AutoConfig.for_model(model_type, **SIZES | settings)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # no gain is 1 and no bias 0, and attention is not flat
      parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5)
    want = model(torch.from_numpy(TOKENS)).logits.numpy()
  model.save_pretrained(tmp_path)
  lm = read(tmp_path)
  assert {name: getattr(lm.config, name) for name in wanted} == wanted
  first, state = lm(TOKENS[:, :20])
  second, _ = lm(TOKENS[:, 20:], state)
  np.testing.assert_allclose(np.concatenate([first, second], 1), want, atol=1e-4)

  values = json.loads((tmp_path / "config.json").read_text())
  rope = values.pop("rope_parameters")
  values["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
  older = values | {"rope_scaling": None if kind == "default" else rope | {"type": kind}}
  assert hf_config.model_config(older, {}, "") == lm.config


def config_of(model_type, **settings):
  values = {"model_type": model_type} | SIZES | settings
  return hf_config.model_config({key: value for key, value in values.items() if value != "absent"}, {}, "config.json")


@pytest.mark.parametrize(
  "model_type, settings, wanted",
  [
    ("qwen2", {"num_attention_heads": 32, "hidden_size": 64, "num_key_value_heads": "absent"}, {"num_kv_heads": 32}),
    ("qwen2", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("qwen2", {"sliding_window": 32768, "max_window_layers": 28}, {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True}, {"sliding_window": None}),  # none of the layers comes after the 28th
    ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"]}, {"sliding_window": 4096}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, {"sliding_window": None}),
    ("qwen2", {"layer_types": ["full_attention"], "use_mrope": False}, {"sliding_window": None}),
    ("qwen3", {"head_dim": "absent"}, {"head_dim": 128}),
    ("llama", {"architectures": ["LLaMAForCausalLM"]}, {"num_kv_heads": 2}),
    (
      "qwen3",
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
      {"rope": RopeConfig(1e4, "yarn", 4.0, original_max_positions=32768, attention_factor=0.1 * np.log(4.0) + 1)},
    ),
  ],
  ids=str,
)
def test_configs(model_type, settings, wanted):
  config = config_of(model_type, **settings)
  assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
  "model_type, settings, fragment",
  [
    (
      "qwen2",
      {"use_sliding_window": True, "num_hidden_layers": 2, "max_window_layers": 1},
      "max_window_layers=1: a window for",
    ),
    (
      "qwen3",
      {"use_sliding_window": True, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
      "layer_types=['full_attention', 'sliding_attention']: a window for some",
    ),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention']"),
    ("qwen2", {"max_window_layers": "28", "use_sliding_window": True}, "max_window_layers='28'"),
    ("qwen2", {"attention_bias": False}, "attention_bias=False"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen2", {"use_mrope": True}, "use_mrope=True: unknown key"),
    ("qwen2_moe", {}, "model_type='qwen2_moe' is not supported: only llama, mistral, qwen2, qwen3, mamba, openlm"),
    (["llama"], {}, "model_type=['llama']"),
  ],
)
def test_refused_configs(model_type, settings, fragment):
  with pytest.raises(ConversionError) as caught:
    config_of(model_type, **settings)
  assert fragment in str(caught.value)


# Found in public checkpoints, and passed over by transformers' own classes.
HARMLESS = {
  "dual_chunk_attention_config": {"chunk_size": 8, "local_size": 4, "original_max_position_embeddings": 8},
  "gradient_checkpointing": True,
  "mergekit_version": "0.1",
  "num_labels": 1,
  "use_sdpa": True,
}
ATTN_FACTOR = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attn_factor": 0.878}
OLDER_YARN = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8, "finetuned": True}


def saved(directory, model_type, **settings):
  """A model with other logits for any other attention; its config.json says `settings`, and transformers reads it."""
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(model_type, **SIZES)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5)
  model.save_pretrained(directory)
  values = json.loads((directory / "config.json").read_text()) | settings
  (directory / "config.json").write_text(json.dumps(values))
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize(
  "model_type, rope",
  [("llama", OLDER_YARN), ("mistral", None), ("qwen2", None), ("qwen3", ATTN_FACTOR)],
)
@pytest.mark.usefixtures("quick_compilation")
def test_keys_that_transformers_passes_over(tmp_path, model_type, rope):
  torch = pytest.importorskip("torch")
  older = {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": rope} if rope else {}
  model = saved(tmp_path, model_type, **HARMLESS, **older)
  with torch.no_grad():
    want = model(torch.from_numpy(TOKENS)).logits.numpy()
  np.testing.assert_allclose(read(tmp_path)(TOKENS)[0], want, atol=1e-4)


@pytest.mark.usefixtures("quick_compilation")
def test_sliding_window_of_a_llama(tmp_path):
  """transformers' attention passes over it, and its cache does not: only a window that holds all is one model."""
  torch = pytest.importorskip("torch")

  def in_two_ways(model):
    tokens, pieces, past = torch.from_numpy(TOKENS), [], None
    with torch.no_grad():
      for at in range(TOKENS.shape[1]):
        out = model(tokens[:, at : at + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits.numpy())
      return model(tokens, use_cache=False).logits.numpy(), np.concatenate(pieces, 1)

  at_once, by_token = in_two_ways(saved(tmp_path / "64", "llama", sliding_window=64))
  np.testing.assert_allclose(by_token, at_once, atol=1e-4)
  np.testing.assert_allclose(read(tmp_path / "64")(TOKENS)[0], at_once, atol=1e-4)
  at_once, by_token = in_two_ways(saved(tmp_path / "8", "llama", sliding_window=8))
  assert np.abs(at_once - by_token).max() > 0.1
  with pytest.raises(ConversionError, match=r"sliding_window=8: only null, or a window no shorter than max_position"):
    read(tmp_path / "8")
