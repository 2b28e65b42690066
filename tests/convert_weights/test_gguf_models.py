"""GGUF files of every architecture as llama.cpp writes them, against the model of transformers that they hold."""

import math

import gguf
import numpy as np
import pytest
from tiny_checkpoints import permute, read

from convert_weights import hf_to_orbax, verify
from convert_weights.errors import ConversionError
from convert_weights.open_source import open_source
from supra_jax.model.config import RopeConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
  "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODULES = {
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tiny(family, **config):
  """A model of transformers with random weights, biases and norms too."""
  torch.manual_seed(0)
  made = transformers.AutoConfig.for_model(family, **(SIZES | config))
  model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
  for name, parameter in model.named_parameters():
    if parameter.ndim == 1:
      torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
  return model


def write(path, model, architecture, factors=None, **metadata):
  """As llama.cpp's convert_hf_to_gguf.py does; `metadata` are what GGUFWriter's add_NAME methods are given."""
  c = model.config
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(c.max_position_embeddings)
  writer.add_embedding_length(c.hidden_size)
  writer.add_block_count(c.num_hidden_layers)
  writer.add_feed_forward_length(c.intermediate_size)
  writer.add_head_count(c.num_attention_heads)
  writer.add_head_count_kv(c.num_key_value_heads)
  writer.add_layer_norm_rms_eps(c.rms_norm_eps)
  writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
  if architecture == "qwen3":
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
  for name, value in metadata.items():
    getattr(writer, f"add_{name}")(value)
  writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
  if factors is not None:
    writer.add_tensor("rope_freqs.weight", factors)
  heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
  for name, tensor in model.state_dict().items():
    array = tensor.numpy()
    if name == "lm_head.weight":
      if c.tie_word_embeddings:
        continue
      theirs = "output.weight"
    elif name in OUTSIDE:
      theirs = OUTSIDE[name]
    else:
      layer, inner = name.removeprefix("model.layers.").split(".", 1)
      module, last = inner.rsplit(".", 1)
      theirs = f"blk.{layer}.{MODULES[module]}.{last}"
      if architecture == "llama" and (count := heads.get(module.rpartition(".")[2])):
        array = permute(array, count)
    writer.add_tensor(theirs, np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def loaded(source):
  """Our parameters of a source, and its config without what only a tokenizer knows."""
  opened = open_source(source)
  config = opened.config.replace(bos_token_id=None, eos_token_ids=())
  return config, {"/".join(leaf.path): leaf.read() for leaf in opened.leaves}


def same(path, model, directory):
  """The file holds what the directory that transformers writes does; returns the config."""
  model.save_pretrained(directory)
  (config, got), (wanted_config, wanted) = loaded(path), loaded(directory)
  assert config == wanted_config
  assert got.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)
  return config


CASES = {
  "llama": ("llama", {}),
  "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
  "mistral": ("llama", {"sliding_window": None}),
  "qwen2": ("qwen2", {}),
  "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
  "qwen3": ("qwen3", {"head_dim": 32}),
  "qwen3-tied": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),  # all that transformers reads of it in GGUF
}


@pytest.mark.parametrize("case", CASES)
def test_architectures(tmp_path, case):
  architecture, config = CASES[case]
  model = tiny(case.partition("-")[0], **config)
  same(write(tmp_path / "m.gguf", model, architecture), model, tmp_path / "hf")


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3-tied"])
@pytest.mark.usefixtures("quick_compilation")
def test_logits_of_transformers_reading_the_file(tmp_path, case):
  architecture, config = CASES[case]
  path = write(tmp_path / "m.gguf", tiny(architecture, **config), architecture)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
  tokens = np.random.default_rng(0).integers(SIZES["vocab_size"], size=(1, 40))
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(read(path)(tokens)[0], wanted, atol=1e-4)


def llama_3_factors(base, head_dim, factor, low=1.0, high=4.0, original=8192):
  """What frequencies are divided by, in float32, as llama.cpp's converter computes it."""
  factors = []
  for frequency in 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
      factors.append(1.0)
    elif wavelength > original / low:
      factors.append(factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
  "base, head_dim, factor, original, metadata",
  [
    (500_000.0, 128, 8.0, 8192, {}),  # Llama 3.1
    (500_000.0, 64, 32.0, 8192, {}),  # Llama 3.2
    (500_000.0, 16, 8.0, 8192, {}),
    (10_000.0, 16, 5.0, 64, {"rope_scaling_orig_ctx_len": 64, "rope_scaling_factor": 5.0}),
  ],
)
def test_factors_of_llama_3(tmp_path, base, head_dim, factor, original, metadata):
  rope = LLAMA_3 | {"rope_theta": base, "factor": factor, "original_max_position_embeddings": original}
  model = tiny("llama", head_dim=head_dim, hidden_size=4 * head_dim, rope_parameters=rope)
  factors = llama_3_factors(base, head_dim, factor, original=original)
  path = write(tmp_path / "m.gguf", model, "llama", factors, **metadata)
  assert same(path, model, tmp_path / "hf").rope.scaling == "llama3"


def test_other_factors(tmp_path):
  model = tiny("llama")
  path = write(tmp_path / "ones.gguf", model, "llama", np.ones(8, np.float32))
  assert same(path, model, tmp_path / "hf").rope == RopeConfig()
  for factors in (llama_3_factors(1e4, 16, 7.0), llama_3_factors(1e4, 16, 8.0, high=5.0), 8 * np.ones(8, np.float32)):
    path = write(tmp_path / "m.gguf", model, "llama", factors)
    with pytest.raises(
      ConversionError, match=r"m\.gguf: .*\n.*\n  rope_freqs\.weight: these divide the frequencies by"
    ):
      open_source(path)


@pytest.mark.parametrize("betas", [{}, {"beta_fast": 24.0, "beta_slow": 2.0}])
def test_yarn(tmp_path, betas):
  rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64, **betas}
  model = tiny("qwen2", rope_parameters=rope)
  metadata = {"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 4.0}
  metadata |= {f"rope_scaling_yarn_{name}": value for name, value in betas.items()}
  path = write(tmp_path / "m.gguf", model, "qwen2", rope_scaling_orig_ctx_len=64, **metadata)
  config = same(path, model, tmp_path / "hf")
  assert config.rope.scaling == "yarn" and config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_verify_knows_what_transformers_passes_over(tmp_path):
  """YaRN and Qwen3's head_dim: its own reading would be another model, and a right conversion would fail."""
  rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
  model = tiny("qwen3", head_dim=16, rope_parameters=rope)
  metadata = {"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 4.0}
  path = write(tmp_path / "m.gguf", model, "qwen3", rope_scaling_orig_ctx_len=64, **metadata)
  hf_to_orbax.convert(path, tmp_path / "converted")
  found = verify.compare(path, tmp_path / "converted")
  assert found.largest < 1e-4 * found.deviation
