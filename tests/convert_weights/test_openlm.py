"""OpenLM's models, SUPRA and softmax, in all variants that its configs can name, and in all forms of its files."""

import json
import shutil

import numpy as np
import openlm_reference as reference
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import read

from convert_weights import openlm_config
from convert_weights.errors import ConversionError
from convert_weights.open_source import open_source
from supra_jax.experiments import tiny
from supra_jax.model.config import RopeConfig
from supra_jax.model.presets import mistral_7b
from supra_jax.model.registry import layers
from tests.support import openlm

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24))
BASE = json.loads((openlm.GOLDEN / "gqa_8_2" / "config.json").read_text()) | {"n_layers": 1}
ONE_HEAD_EACH = {"n_heads_kv": 8}
SOFTMAX = {"attn_name": "xformers_attn"}


def write(directory, tensors, prefix="model.", **changes):
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps({k: v for k, v in (BASE | changes).items() if v != "absent"}))
  save_file({prefix + name: tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
  return directory


@pytest.mark.parametrize("case", ["mha_decay", "gqa_8_2", "no_decay"])
def test_the_reference_here_is_the_reference(case):
  config = json.loads((openlm.GOLDEN / case / "config.json").read_text())
  tensors = {n.removeprefix("model."): t for n, t in load_file(openlm.GOLDEN / case / "model.safetensors").items()}
  golden = openlm.load_golden(case)
  assert {name: tensor.shape for name, tensor in tensors.items()} == reference.shapes(config)
  got = reference.logits(config, tensors, golden["input_ids"][:1])
  np.testing.assert_allclose(got, golden["logits_parallel"][:1], atol=5e-5)


@pytest.mark.parametrize(
  "changes, wanted",
  [
    ({"rotary_base_frequency": 500, "rotary_scale": 4.0}, {"rope": RopeConfig(500.0, "linear", 4.0)}),
    (
      {"positional_embedding_type": "llama_rotary", "rotary_base_frequency": 500, "rotary_scale": 4.0},
      {"rope": RopeConfig(kind="interleaved")},
    ),
    ({"positional_embedding_type": "head_rotary"}, {"rope": RopeConfig(kind="by_head")}),
    (
      {"positional_embedding_type": "none", "post_embed_norm": True, "ffn_type": "swiglu_torch"},
      {"rope": RopeConfig(kind="none"), "post_embed_norm": True},
    ),
    ({"v_head_dim": 12, "weight_tying": True}, {"value_head_dim": 12, "tie_embeddings": True}),
    (
      {"apply_qk_norm": True, "norm_type": "default_layer_norm", "use_retnet_slopes": True, "post_embed_norm": True},
      {"layers": layers(("supra",), decay="retnet", qk_norm=True), "norm": "layer_norm", "post_embed_norm": True},
    ),
    (
      {"apply_qk_norm": True, "norm_type": "gain_only_lp_layer_norm", "decay_start": 2, **ONE_HEAD_EACH},
      {
        "layers": layers(("supra",), decay_start=2.0, qk_norm=True),
        "norm": "layer_norm_gain",
        "num_kv_heads": 8,
      },
    ),
    ({"use_decay": False, "use_retnet_slopes": True}, {"layers": layers(("supra",), decay="none")}),
    (SOFTMAX, {"layers": layers(("softmax",))}),
    (
      SOFTMAX | {"positional_embedding_type": "head_rotary", "v_head_dim": 4},
      {"layers": layers(("softmax",)), "rope": RopeConfig(kind="by_head"), "value_head_dim": 4},
    ),
    (
      SOFTMAX | {"positional_embedding_type": "llama_rotary", "weight_tying": True, "norm_type": "lp_layer_norm"},
      {
        "layers": layers(("softmax",)),
        "rope": RopeConfig(kind="interleaved"),
        "tie_embeddings": True,
        "norm": "layer_norm",
      },
    ),
    (
      SOFTMAX | ONE_HEAD_EACH | {"apply_qk_norm": True, "norm_type": "gain_only_layer_norm"},
      {"layers": layers(("softmax",)), "num_kv_heads": 8, "qk_norm": "all_heads", "norm": "layer_norm_gain"},
    ),
    (
      SOFTMAX | {"positional_embedding_type": "none", "qk_head_dim": 5},
      {"layers": layers(("softmax",)), "rope": RopeConfig(kind="none"), "head_dim": 5, "value_head_dim": 8},
    ),
  ],
  ids=str,
)
@pytest.mark.usefixtures("quick_compilation")
def test_variants(tmp_path, changes, wanted):
  tensors = reference.random_tensors(BASE | changes)
  lm = read(write(tmp_path / "source", tensors, **changes))
  plain = openlm_config.model_config(BASE, "")
  assert lm.config == plain.replace(**wanted)
  first, state = lm(TOKENS[:, :12])
  second, _ = lm(TOKENS[:, 12:], state)
  want = reference.logits(BASE | changes, tensors, TOKENS)
  np.testing.assert_allclose(np.concatenate([first, second], 1), want, atol=1e-4)


def test_what_is_absent():
  short = {key: BASE[key] for key in ("model_type", "dim", "n_layers", "n_heads", "vocab_size")}
  config = openlm_config.model_config(short, "")
  assert (config.num_kv_heads, config.head_dim, config.value_width, config.intermediate_size) == (8, 8, 8, 256)
  assert (config.norm, config.norm_eps, config.rope) == ("layer_norm", 1e-5, RopeConfig())
  assert config.mixers == ("softmax",) and config.qk_norm == "none" and not config.tie_embeddings
  linear = openlm_config.model_config(short | {"attn_name": "linear_attn", "dim": 1008}, "")
  assert linear.layers == layers(("supra",), decay="none") and linear.intermediate_size == 2816


def test_config_of_the_release():
  """TRI-ML/mistral-supra."""
  keys = json.loads((openlm.GOLDEN / "released_form_bin" / "config.json").read_text())
  sizes = {"dim": 4096, "intermediate_dim_ffn": 14336, "n_layers": 32, "n_heads": 32, "n_heads_kv": 8, "seq_len": 2048}
  config = openlm_config.model_config(keys | sizes | {"vocab_size": 32000, "qk_head_dim": 128, "v_head_dim": 128}, "")
  teacher = mistral_7b("supra")
  same = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rope", "norm")
  assert [getattr(config, name) for name in same] == [getattr(teacher, name) for name in same]
  assert config.layers == teacher.layers == layers(("supra",) * 32) and config.norm_eps == 1e-5


@pytest.mark.parametrize(
  "changes, fragment",
  [
    ({"ffn_type": "gelu"}, "ffn_type='gelu'"),
    ({"ffn_type": "gemma_geglu"}, "ffn_type='gemma_geglu'"),
    ({"moe_freq": 2}, "moe_freq=2"),
    ({"norm_type": "no_wb_layer_norm"}, "norm_type='no_wb_layer_norm'"),
    ({"norm_type": ["rms_norm"]}, "norm_type=['rms_norm']"),
    ({"attn_name": "custom_attn"}, "attn_name='custom_attn'"),
    ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
    ({"qk_head_dim": 16}, "qk_head_dim=16: only dim / n_heads = 8"),
    ({"dim": 60}, "dim=60: not divisible by n_heads=8"),
    ({"dim": "absent"}, "dim: missing"),
    ({"n_layers": 10**12}, "n_layers=1000000000000: wanted at most"),
    ({"hidden_dim": 64}, "hidden_dim=64: unknown key"),
    ({"architectures": ["OpenLMModel"]}, "architectures=['OpenLMModel']"),
    ({"decay_start": -1}, "decay_start=-1"),
    ({"norm_eps": 10**400}, "norm_eps="),
    ({"n_heads_kv": 3}, "does not divide"),
    ({"use_decay": 1}, "use_decay=1"),
    (SOFTMAX | {"apply_qk_norm": True}, "apply_qk_norm=True"),
  ],
)
def test_refused_configs(changes, fragment):
  config = {key: value for key, value in (BASE | changes).items() if value != "absent"}
  with pytest.raises(ConversionError) as caught:
    openlm_config.model_config(config, "there/config.json")
  assert fragment in str(caught.value) and "there/config.json" in str(caught.value)


def leaves(source, tokenizer=None):
  return {leaf.path: leaf.read() for leaf in open_source(source, tokenizer).leaves}


def assert_same(got, wanted):
  assert got.keys() == wanted.keys()
  for path, array in wanted.items():
    np.testing.assert_array_equal(got[path], array, strict=True, err_msg=str(path))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model."])
def test_prefixes(tmp_path, prefix):
  tensors = reference.random_tensors(BASE)
  wanted = leaves(write(tmp_path / "plain", tensors))
  rotary = {"layers.0.attention.pos_embed.inv_freq": np.ones(4, np.float32)}
  assert_same(leaves(write(tmp_path / "other", tensors | rotary, prefix)), wanted)


def test_a_tensor_with_and_without_a_prefix(tmp_path):
  tensors = reference.random_tensors(BASE)
  source = write(tmp_path / "source", tensors | {"model.norm.weight": tensors["norm.weight"]}, "")
  with pytest.raises(ConversionError, match=r"with and without a prefix \(1\):\n  norm.weight"):
    open_source(source)


def test_tied_embeddings_under_either_name(tmp_path):
  tied = {"weight_tying": True}
  tensors = reference.random_tensors(BASE | tied)
  wanted = leaves(write(tmp_path / "both", tensors, **tied))
  for missing in ("tok_embeddings.weight", "output.weight"):
    some = {name: tensor for name, tensor in tensors.items() if name != missing}
    assert_same(leaves(write(tmp_path / missing, some, **tied)), wanted)
  neither = {name: tensor for name, tensor in some.items() if name != "tok_embeddings.weight"}
  with pytest.raises(ConversionError, match=r"missing tensors \(1\):\n  tok_embeddings.weight \[61, 64\]"):
    open_source(write(tmp_path / "neither", neither, **tied))
  different = tensors | {"output.weight": tensors["output.weight"] + 1}
  with pytest.raises(ConversionError, match=r"ties the embeddings, but output\.weight differs"):
    leaves(write(tmp_path / "different", different, **tied))


def test_totality(tmp_path):
  tensors = reference.random_tensors(BASE)
  tensors["layers.0.attention.in_proj.weight"] = tensors["layers.0.attention.in_proj.weight"][:-1]
  del tensors["layers.0.attention._totrain_embed_kv.bias"]
  tensors["layers.0.attention._totrain_q_norm.weight"] = np.ones(64, np.float32)
  with pytest.raises(ConversionError) as caught:
    open_source(write(tmp_path / "source", tensors))
  for fragment in (
    "missing tensors (1):\n  layers.0.attention._totrain_embed_kv.bias [16]",
    "unknown tensors (1):\n  layers.0.attention._totrain_q_norm.weight [64]",
    "layers.0.attention.in_proj.weight: wanted [96, 64], got [95, 64]",
  ):
    assert fragment in str(caught.value)


def test_raw_training_checkpoint(tmp_path):
  torch = pytest.importorskip("torch")
  tensors = reference.random_tensors(BASE)
  wanted = leaves(write(tmp_path / "plain", tensors))
  source = write(tmp_path / "source", {})
  (source / "model.safetensors").unlink()
  state = {f"module.{name}": torch.from_numpy(tensor) for name, tensor in tensors.items()}
  checkpoint = {"epoch": 3, "name": "run", "state_dict": state, "evaluation_loss": 1.5}
  torch.save(checkpoint, source / "epoch_3.pt")
  assert_same(leaves(source), wanted)
  torch.save({"optimizer": {}}, source / "optimizer_3.pt")
  with pytest.raises(ConversionError, match=r"epoch_3.pt, optimizer_3.pt. Give one of"):
    open_source(source)
  opened = open_source(source / "epoch_3.pt")
  assert opened.path == source / "epoch_3.pt" and opened.weight_files == [source / "epoch_3.pt"]
  assert_same(leaves(source / "epoch_3.pt"), wanted)


def test_a_tokenizer_from_elsewhere(tmp_path):
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(tiny.tokenizer_json())
  settings = json.dumps({"bos_token": tiny.END, "eos_token": tiny.END})
  (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(settings)
  changes = {"vocab_size": tiny.VOCAB}
  source = write(tmp_path / "source", reference.random_tensors(BASE | changes), **changes)
  opened = open_source(source, tmp_path / "tokenizer")
  assert (opened.config.bos_token_id, opened.config.eos_token_ids) == (0, (0,))
  assert opened.tokenizer_files["tokenizer.json"] == tiny.tokenizer_json()
  assert json.loads(opened.tokenizer_files["tokenizer_config.json"]) == json.loads(settings)
  assert open_source(source).tokenizer_files == {} and open_source(source).config.eos_token_ids == ()
  shutil.rmtree(tmp_path / "tokenizer")
  with pytest.raises(ConversionError, match=r"tokenizer: wanted a directory that holds a tokenizer"):
    open_source(source, tmp_path / "tokenizer")
