"""Hugging Face directories convert tensor by tensor, in both spellings of the config."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CASES, GOLDEN, TOKENIZER, change_config, check_parameters, copy_case, leaf, source_tensors

from convert_weights import hf_config, hf_to_orbax, orbax_to_hf, verify
from convert_weights.hf_to_orbax import convert
from supra_jax.model import presets
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.registry import layers
from supra_jax.storage.model_directory import load_model
from tests.support import programs

BASE = ModelConfig(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=64,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  layers=layers(("softmax", "softmax")),
  max_positions=128,
  bos_token_id=1,
  eos_token_ids=(2,),
)
LLAMA3 = RopeConfig(500_000.0, "llama3", factor=8.0, original_max_positions=32)
WANTED = {
  "llama_gqa_tied": BASE.replace(tie_embeddings=True),
  "llama_llama3rope": BASE.replace(rope=LLAMA3),
  "llama_mha_untied": BASE.replace(num_kv_heads=6),
  "mistral_gqa": BASE,
  "mistral_headdim16_theta1e6": BASE.replace(head_dim=16, rope=RopeConfig(1e6)),
  "mistral_sw16": BASE.replace(sliding_window=16),
}


@pytest.mark.parametrize("spelling", ["config.json", "config_legacy.json"])
@pytest.mark.parametrize("case", CASES)
def test_golden_case(case, spelling, tmp_path):
  source = copy_case(case, tmp_path / "source")
  shutil.copy(GOLDEN / case / spelling, source / "config.json")
  convert(source, tmp_path / "out")
  model = load_model(tmp_path / "out")
  assert model.config == WANTED[case]
  check_parameters(model.params, source_tensors(case), model.config.tie_embeddings)
  assert list(model.tokenizer_files) == ["generation_config.json"]
  weights = (source / "model.safetensors").read_bytes()
  assert model.source["kind"] == "huggingface" and model.source["dtype"] == "float32"
  assert model.source["files"] == [
    {"name": "model.safetensors", "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
  ]
  assert model.source["config"] == json.loads((GOLDEN / case / spelling).read_text())


def reshard(source, groups):
  """Splits model.safetensors of a directory into shards with an index."""
  tensors = load_file(source / "model.safetensors")
  (source / "model.safetensors").unlink()
  names, weight_map = list(tensors), {}
  for i in range(groups):
    file_name = f"model-{i + 1:05}-of-{groups:05}.safetensors"
    part = {name: tensors[name] for name in names[i::groups]}
    save_file(part, source / file_name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file_name)
  index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  (source / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
  source = copy_case("llama_mha_untied", tmp_path / "source")
  reshard(source, 3)
  convert(source, tmp_path / "out")
  model = load_model(tmp_path / "out")
  check_parameters(model.params, source_tensors("llama_mha_untied"), tied=False)
  assert len(model.source["files"]) == 3


def test_shards_may_be_links(tmp_path):
  """The hub's cache is a directory of links to blobs elsewhere."""
  source = copy_case("mistral_gqa", tmp_path / "source")
  reshard(source, 2)
  (tmp_path / "blobs").mkdir()
  for i, shard in enumerate(sorted(source.glob("*.safetensors"))):
    shard.rename(tmp_path / "blobs" / str(i))
    shard.symlink_to(tmp_path / "blobs" / str(i))
  convert(source, tmp_path / "out")
  check_parameters(load_model(tmp_path / "out").params, source_tensors("mistral_gqa"), tied=False)


@pytest.mark.parametrize(
  "stored, flag, wanted",
  [
    (ml_dtypes.bfloat16, None, jnp.bfloat16),
    (ml_dtypes.bfloat16, "float32", jnp.float32),
    (np.float16, None, jnp.float32),
    (np.float16, "bfloat16", jnp.bfloat16),
    (np.float32, "bfloat16", jnp.bfloat16),
    (np.float64, None, jnp.float32),
    (np.float64, "bfloat16", jnp.bfloat16),
  ],
)
def test_dtypes(stored, flag, wanted, tmp_path):
  source = copy_case("mistral_gqa", tmp_path / "source")
  tensors = {name: tensor.astype(stored) for name, tensor in source_tensors("mistral_gqa").items()}
  save_file(tensors, source / "model.safetensors")
  convert(source, tmp_path / "out", flag)
  params = load_model(tmp_path / "out").params
  expected = {name: tensor.astype(np.float32).astype(wanted) for name, tensor in tensors.items()}
  check_parameters(params, expected, tied=False)


def test_float16_says_what_halves_it(tmp_path, capsys):
  source = copy_case("mistral_gqa", tmp_path / "source")
  tensors = {name: tensor.astype(np.float16) for name, tensor in source_tensors("mistral_gqa").items()}
  save_file(tensors, source / "model.safetensors")
  convert(source, tmp_path / "out", progress=True)
  size = sum(tensor.nbytes for tensor in tensors.values())
  said = capsys.readouterr().err
  assert f"{2 * size:,} bytes. --dtype=bfloat16 rounds it to half of that, {size:,} bytes." in said
  convert(source, tmp_path / "half", "bfloat16", progress=True)
  assert "--dtype" not in capsys.readouterr().err


def test_mixed_dtypes_become_the_one_that_holds_all(tmp_path):
  source = copy_case("mistral_gqa", tmp_path / "source")
  tensors = {n: t.astype(np.float16 if t.ndim == 1 else ml_dtypes.bfloat16) for n, t in load(source).items()}
  save_file(tensors, source / "model.safetensors")
  convert(source, tmp_path / "out")
  check_parameters(load_model(tmp_path / "out").params, {n: t.astype(np.float32) for n, t in tensors.items()}, False)


def load(source):
  return load_file(source / "model.safetensors")


def test_biases(tmp_path):
  source = copy_case("llama_gqa_tied", tmp_path / "source", attention_bias=True, mlp_bias=True)
  tensors, rng = load(source), np.random.default_rng(0)
  biases = {
    name.replace(".weight", ".bias"): rng.standard_normal(tensor.shape[0], np.float32)
    for name, tensor in tensors.items()
    if "_proj" in name
  }
  save_file(tensors | biases, source / "model.safetensors")
  convert(source, tmp_path / "out")
  model = load_model(tmp_path / "out")
  assert model.config == WANTED["llama_gqa_tied"].replace(qkv_bias=True, output_bias=True, mlp_bias=True)
  for name, bias in biases.items():
    path = name.removeprefix("model.").replace("layers.", "layers_").replace(".", "/")
    np.testing.assert_array_equal(leaf(model.params, path), bias)


def test_rotary_buffers_are_skipped_and_a_stored_tied_unembedding_is_checked(tmp_path):
  source = copy_case("llama_gqa_tied", tmp_path / "source")
  tensors = load(source)
  buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
  unembedding = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
  save_file(tensors | buffers | unembedding, source / "model.safetensors")
  convert(source, tmp_path / "out")
  check_parameters(load_model(tmp_path / "out").params, tensors, tied=True)


def config_of(case="mistral_gqa", generation=None, **changes):
  config = json.loads((GOLDEN / case / "config.json").read_text()) | changes
  config = {key: value for key, value in config.items() if value != "absent"}
  return hf_config.model_config(config, generation or {}, "config.json")


@pytest.mark.parametrize(
  "case, changes, wanted",
  [
    ("mistral_gqa", {"head_dim": None}, {}),
    ("mistral_gqa", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
    ("mistral_gqa", {"sliding_window": "absent"}, {"sliding_window": 4096}),
    ("mistral_sw16", {"layer_types": ["sliding_attention"] * 2}, {"sliding_window": 16}),
    ("llama_mha_untied", {"num_key_value_heads": "absent"}, {"num_kv_heads": 6}),
    ("llama_mha_untied", {"rms_norm_eps": "absent"}, {"num_kv_heads": 6, "norm_eps": 1e-6}),
    ("llama_mha_untied", {"rope_parameters": "absent"}, {"num_kv_heads": 6}),
    (
      "mistral_gqa",
      {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e5},
      {"rope": RopeConfig(1e5, "linear", factor=4.0)},
    ),
    ("mistral_gqa", {"rope_theta": 10_000}, {}),
    ("mistral_gqa", {"eos_token_id": [2, 5]}, {"eos_token_ids": (2, 5)}),
    ("mistral_gqa", {"bos_token_id": None, "eos_token_id": None}, {"bos_token_id": None, "eos_token_ids": ()}),
    ("mistral_gqa", {"quantization_config": None, "some_new_switch": False, "pruned_heads": {}}, {}),
  ],
)
def test_config_spellings(case, changes, wanted):
  assert config_of(case, **changes) == BASE.replace(**wanted)


def test_configs_of_public_checkpoints():
  """The key sets that hubs carry, harmless ones included, against the presets."""
  shared = {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
  mistral = shared | {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0.dev0",
    "vocab_size": 32000,
  }
  assert hf_config.model_config(mistral, {}, "") == presets.mistral_7b()
  smollm2 = shared | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
  }
  wanted = presets.smollm2_135m().replace(bos_token_id=0, eos_token_ids=(0,))
  assert hf_config.model_config(smollm2, {}, "") == wanted


def test_generation_config_adds_what_ends_a_text():
  assert config_of(generation={"eos_token_id": [2, 7], "bos_token_id": 3}).eos_token_ids == (2, 7)
  assert config_of(generation={"bos_token_id": 3}).bos_token_id == 1
  assert config_of(generation={"bos_token_id": 3}, bos_token_id=None).bos_token_id == 3


def test_tokenizer_files_are_copied(tmp_path):
  source = copy_case("mistral_gqa", tmp_path / "source")
  contents = json.dumps(
    {
      "version": "1.0",
      "added_tokens": [],
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
      "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
      "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
  )
  (source / "tokenizer.json").write_text(contents)
  (source / "tokenizer.model").write_bytes(b"never read where there is a tokenizer.json")
  (source / "tokenizer_config.json").write_text('{"model_max_length": 7}')
  convert(source, tmp_path / "out")
  files = load_model(tmp_path / "out").tokenizer_files
  assert files.keys() == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
  assert files["tokenizer.json"] == contents.encode()
  assert json.loads(files["tokenizer_config.json"]) == {"model_max_length": 7}


def test_program_with_a_tokenizer_from_elsewhere(tmp_path):
  source, other = copy_case("mistral_gqa", tmp_path / "source"), tmp_path / "tokenizer"
  other.mkdir()
  for name, contents in TOKENIZER.items():
    (other / name).write_bytes(contents)
  given = f"--source={source}", f"--output={tmp_path / 'out'}", f"--tokenizer={other}"
  done = programs.run("convert_weights.hf_to_orbax", *given)
  assert done.returncode == 0, done.stderr
  assert load_model(tmp_path / "out").tokenizer_files["tokenizer.json"] == TOKENIZER["tokenizer.json"]


@pytest.mark.compat
def test_program(tmp_path):
  source = copy_case("mistral_gqa", tmp_path / "source")
  command = ["convert_weights.hf_to_orbax", f"--source={source}", f"--output={tmp_path / 'out'}"]
  done = subprocess.run([sys.executable, "-m", *command, "--dtype=bfloat16"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stderr.startswith("Converting, 100% of ") and done.stderr.count("\n") == 1
  assert load_model(tmp_path / "out").params["norm"]["weight"].dtype == jnp.bfloat16
  change_config(source, hidden_act="gelu")
  done = programs.run(*command, f"--output={tmp_path / 'other'}")
  assert done.returncode == 1
  assert "hidden_act='gelu'" in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "other").exists()


@pytest.mark.compat
def test_an_imported_main_finds_its_flags(tmp_path):
  """Of a caller who parses them, as for a program of their own that converts, exports and compares."""
  source = copy_case("mistral_gqa", tmp_path / "source")
  out, exported = tmp_path / "out", tmp_path / "exported"
  for module, given in (
    (hf_to_orbax, {"source": source, "output": out}),
    (orbax_to_hf, {"source": out, "output": exported, "format": "transformers"}),
    (verify, {"source": exported, "checkpoint": tmp_path / "none"}),
  ):
    with programs.own_flags():
      module.define_flags()
      flags.FLAGS(["program", *(f"--{name}={value}" for name, value in given.items())])
      if module is verify:
        with pytest.raises(FileNotFoundError, match="none is not a supra_jax model"):
          module.main()
      else:
        module.main()
  want, got = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
  assert want.keys() == got.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])


def test_config_keys_that_are_said_not_to_matter(tmp_path):
  source = copy_case("llama_gqa_tied", tmp_path / "source", my_tool="0.1", rate_of_fire=3)
  with pytest.raises(ValueError, match=r"my_tool='0.1': unknown key.*--ignore_config_keys=my_tool if it does not"):
    convert(source, tmp_path / "out")
  flags_given = [f"--source={source}", f"--output={tmp_path}/out", "--ignore_config_keys=my_tool,rate_of_fire"]
  ran = programs.run("convert_weights.hf_to_orbax", *flags_given)
  assert ran.returncode == 0 and "Ignored in the source's config.json: my_tool='0.1', rate_of_fire=3." in ran.stderr
  model = load_model(tmp_path / "out")
  assert model.config == WANTED["llama_gqa_tied"]
  assert model.source["ignored_config_keys"] == ["my_tool", "rate_of_fire"]
  assert model.source["config"]["rate_of_fire"] == 3
  if verify_can_run():
    assert verify.compare(source, tmp_path / "out").largest < 1e-3
  for wrong in ("hidden_size", "not_there"):
    with pytest.raises(ValueError, match=f"ignore_config_keys={wrong}: wanted keys of .*config.json that no model"):
      convert(source, tmp_path / "other", ignore_config_keys=[wrong])


def verify_can_run() -> bool:
  return importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None


@pytest.mark.parametrize("tied", [True, False])
def test_an_index_that_names_a_tied_unembedding(tied, tmp_path):
  """Which no file has: mergers write such indices. Without tied embeddings something is missing."""
  source = copy_case("llama_gqa_tied" if tied else "llama_mha_untied", tmp_path / "source")
  tensors = load_file(source / "model.safetensors")
  tensors.pop("lm_head.weight", None)
  (source / "model.safetensors").unlink()
  save_file(tensors, source / "part.safetensors")
  index = {"weight_map": dict.fromkeys([*tensors, "lm_head.weight"], "part.safetensors")}
  (source / "model.safetensors.index.json").write_text(json.dumps(index))
  if tied:
    convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out").config == WANTED["llama_gqa_tied"]
  else:
    with pytest.raises(ValueError, match=r"lm_head\.weight: not in part\.safetensors"):
      convert(source, tmp_path / "out")
