"""Ours to others' and back: nothing changes, and what cannot be said is refused."""

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from round_trip import assert_same_bits, assert_same_model, flat, save, there_and_back
from safetensors.numpy import load_file
from tiny_checkpoints import CASES, GOLDEN, TOKENIZER

from convert_weights import hf_export, hf_to_orbax, safetensors_writer
from convert_weights.errors import ConversionError
from convert_weights.openlm_export import export as export_openlm
from convert_weights.orbax_to_hf import convert
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layer, layers, mixer_class
from supra_jax.storage.model_directory import load_model
from tests.support import openlm, programs

ROOT = Path(__file__).resolve().parent.parent.parent
OPENLM_CASES = ["gqa_8_2", "mha_decay", "no_decay", "released_form_bin"]


@pytest.mark.parametrize("case", CASES)
def test_transformers_there_and_back(case, tmp_path):
  hf_to_orbax.convert(GOLDEN / case, tmp_path / "first")
  exported, second = there_and_back(tmp_path / "first", tmp_path)
  assert_same_model(second, load_model(tmp_path / "first"))
  assert_same_bits(load_file(exported / "model.safetensors"), load_file(GOLDEN / case / "model.safetensors"))
  config = json.loads((exported / "config.json").read_text())
  original = json.loads((GOLDEN / case / "config.json").read_text())
  shared = set(config) & set(original) - {"architectures", "model_type"}  # without a window Mistral is Llama
  assert {key: config[key] for key in shared} == {key: original[key] for key in shared}
  assert len(shared) > 14
  generation = json.loads((exported / "generation_config.json").read_text())
  original = json.loads((GOLDEN / case / "generation_config.json").read_text())
  who = {"_from_model_config", "transformers_version"}
  assert generation == {key: value for key, value in original.items() if key not in who}


@pytest.mark.parametrize("case", OPENLM_CASES)
def test_openlm_there_and_back(case, tmp_path):
  if case == "released_form_bin":
    pytest.importorskip("torch")
  hf_to_orbax.convert(openlm.GOLDEN / case, tmp_path / "first")
  exported, second = there_and_back(tmp_path / "first", tmp_path, format="openlm")
  assert_same_model(second, load_model(tmp_path / "first"))
  config = json.loads((exported / "config.json").read_text())
  original = json.loads((openlm.GOLDEN / case / "config.json").read_text())
  ignored = {"transformers_version", "torch_dtype", "dtype"}
  assert {k: config[k] for k in config if k not in ignored} == {k: original[k] for k in original if k not in ignored}
  if case != "released_form_bin":
    assert_same_bits(load_file(exported / "model.safetensors"), load_file(openlm.GOLDEN / case / "model.safetensors"))


EVERYTHING = tiny().replace(
  layers=(
    layer("memory"),
    *layers(
      ("supra", "softmax", "supra_window", "lolcats"),
      feature_map="per_head_separate",
      decay="retnet",
      qk_norm=True,
      window=7,
      sinks=2,
    ),
    layer("memory", window=5, retained=(7, 0), sinks=0, chunk=3, score="random", state_dtype="float32"),
    layer("t2r", feature_map="per_head", normaliser="epsilon", epsilon=0.5, decay_start=0.25),
    layer("linear_transformer", rope=True, normaliser="clamp"),
  ),
  value_head_dim=12,
  norm="layer_norm",
  qk_norm="head",
  post_embed_norm=True,
  sliding_window=9,
  rope=RopeConfig(1e6, "yarn", kind="interleaved", factor=3.0, truncate=False),
  eos_token_ids=(2, 3),
)


@pytest.mark.compat
def test_everything_there_and_back(random_params, tmp_path):
  first = save(tmp_path / "first", EVERYTHING, random_params(EVERYTHING), TOKENIZER)
  exported, second = there_and_back(first, tmp_path)
  assert_same_model(second, load_model(first))
  assert {path.name for path in exported.iterdir()} == {
    "README.md", "attention_supra.py", "config.json", "configuration_supra.py", "generation_config.json",
    "lolcats_supra.py", "memory_supra.py", "model.safetensors", "modeling_supra.py", "normalised_supra.py",
    "tokenizer.json", "tokenizer_config.json",
  }  # fmt: skip


SOFTMAX = tiny("softmax")


@pytest.mark.parametrize(
  "changes, wanted",
  [
    ({}, "LlamaForCausalLM"),
    ({"qkv_bias": True, "output_bias": True}, "LlamaForCausalLM"),
    ({"mlp_bias": True, "rope": RopeConfig(scaling="yarn", factor=2.0)}, "LlamaForCausalLM"),
    ({"hidden_size": 50}, "MistralForCausalLM"),  # transformers' Llama wants what its heads divide
    ({"sliding_window": 7}, "MistralForCausalLM"),
    ({"qkv_bias": True}, "Qwen2ForCausalLM"),
    ({"qkv_bias": True, "sliding_window": 7}, "Qwen2ForCausalLM"),
    ({"qk_norm": "head"}, "Qwen3ForCausalLM"),
    ({"qk_norm": "head", "qkv_bias": True, "output_bias": True, "sliding_window": 7}, "Qwen3ForCausalLM"),
    ({"value_head_dim": 8}, "LlamaForCausalLM"),  # which it is anyway
    ({"output_bias": True}, "SupraForCausalLM"),
    ({"mlp_bias": True, "sliding_window": 7}, "SupraForCausalLM"),
    ({"qk_norm": "all_heads"}, "SupraForCausalLM"),
    ({"norm": "layer_norm_gain"}, "SupraForCausalLM"),
    ({"value_head_dim": 12}, "SupraForCausalLM"),
    ({"post_embed_norm": True}, "SupraForCausalLM"),
    ({"rope": RopeConfig(kind="interleaved")}, "SupraForCausalLM"),
    ({"layers": layers(("softmax", "supra"))}, "SupraForCausalLM"),
    ({"layers": layers(("supra_window",))}, "SupraForCausalLM"),
    ({"layers": layers(("memory",))}, "SupraForCausalLM"),
    ({"layers": layers(("lolcats",))}, "SupraForCausalLM"),
    ({"layers": layers(("t2r",))}, "SupraForCausalLM"),
    ({"layers": layers(("linear_transformer",))}, "SupraForCausalLM"),
  ],
)
def test_which_class(changes, wanted):
  values = hf_export.export(SOFTMAX.replace(eos_token_ids=(2, 3), **changes)).config
  assert values["architectures"] == [wanted]
  assert list(values["eos_token_ids" if wanted == "SupraForCausalLM" else "eos_token_id"]) == [2, 3]


@pytest.mark.parametrize(
  "different, said",
  [
    ((layer("supra"), layer("supra", decay="none")), "decay='lightning' and with decay='none'"),
    ((layer("supra_window"), layer("supra_window", window=9)), "window=64 and with window=9"),
    ((layer("supra", qk_norm=True), layer("softmax"), layer("supra_window")), "qk_norm=True and with qk_norm=False"),
  ],
)
@pytest.mark.parametrize("format", ["transformers", "openlm"])
def test_layers_that_differ_are_refused(different, said, format, tmp_path):
  """Both formats say once for all layers what linear attention is."""
  config = tiny().replace(layers=different)
  with pytest.raises(ConversionError, match=f"Layers with {said}: the format stores it once for all layers"):
    {"transformers": hf_export.export, "openlm": export_openlm}[format](config)


UNKNOWN = [(hf_export.export, "toy"), *((export_openlm, mixer) for mixer in ("toy", "lolcats", "memory", "t2r"))]


@pytest.mark.parametrize("export, mixer", UNKNOWN)
def test_a_mixer_that_others_do_not_know_is_refused(export, mixer):
  from tests.model import toy_mixer  # noqa: F401  # registers itself

  with pytest.raises(ConversionError, match=f"mixer '{mixer}'|'{mixer}' layer"):
    export(tiny().replace(layers=layers(("supra", mixer))))


def test_what_layers_of_two_kinds_share():
  mixed = tiny().replace(layers=layers(("softmax", "supra", "supra_window"), decay="retnet", window=7, sinks=2))
  wanted = WindowConfig(decay="retnet", window=7, sinks=2)
  assert hf_export.export(mixed).config["supra"] == dataclasses.asdict(wanted)
  # As before there were mixers with configs of their own, so that exports stay the same.
  without = hf_export.export(tiny().replace(layers=layers(("supra",), qk_norm=True)))
  assert without.config["supra"] == dataclasses.asdict(WindowConfig(qk_norm=True, window=64, sinks=0))


def test_the_code_knows_every_field():
  """A field that is new to ModelConfig is one that the torch code has to follow."""
  code = ast.parse((ROOT / "convert_weights/for_transformers/configuration_supra.py").read_text())
  (defaults,) = (node.value for node in code.body if isinstance(node, ast.AnnAssign))
  known = eval(compile(ast.Expression(defaults), "", "eval"), {})
  ours = json.loads(json.dumps(hf_export.export(hf_export.own_config(known, "")).config))
  for key in ("memories", "normalised"):
    assert known.pop(key) is None  # where no layer has one, which exports do not say
  assert known == {key: ours[key] for key in set(ours) - {"architectures", "auto_map", "model_type"}}
  assert set(known) == {field.name for field in dataclasses.fields(ModelConfig)} - {"layers"} | {"mixers", "supra"}
  configs = [mixer_class(name).Config for name in ("softmax", "supra", "supra_window")]
  assert set(known["supra"]) == {field.name for config in configs for field in dataclasses.fields(config)}


def test_the_code_needs_nothing_of_ours_and_is_installed():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
  assert project == {"convert_weights": ["for_transformers/*.py"]}
  for path in (ROOT / "convert_weights/for_transformers").iterdir():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        assert {alias.name.split(".")[0] for alias in node.names} <= {"math", "torch"}
      elif isinstance(node, ast.ImportFrom) and not node.level:
        assert str(node.module).split(".")[0] in {"__future__", "collections", "torch", "transformers", "typing"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model") / "orbax"
  hf_to_orbax.convert(GOLDEN / "llama_mha_untied", directory)
  return directory


def test_shards(model, monkeypatch, tmp_path):
  monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 40_000)
  monkeypatch.setattr(safetensors_writer, "_BLOCK_BYTES", 1000)
  monkeypatch.setattr(safetensors_writer, "_TILE", 7)
  exported, second = there_and_back(model, tmp_path)
  assert_same_model(second, load_model(model))
  index = json.loads((exported / "model.safetensors.index.json").read_text())
  shards = {path.name: load_file(path) for path in exported.glob("model-*-of-*.safetensors")}
  assert len(shards) == 6 and set(index["weight_map"].values()) == set(shards)
  assert all(sum(t.nbytes for t in shard.values()) <= 40_000 for shard in shards.values())
  assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())


@pytest.mark.parametrize(
  "stored, dtype, wanted",
  [
    (np.float32, "bfloat16", ml_dtypes.bfloat16),
    (np.float16, None, np.float16),
    (ml_dtypes.bfloat16, None, ml_dtypes.bfloat16),
    (ml_dtypes.bfloat16, "float32", np.float32),
  ],
)
def test_dtypes(model, stored, dtype, wanted, tmp_path):
  ours = load_model(model)
  params = {path: array.astype(stored) for path, array in flat(ours.params)}
  save(tmp_path / "first", ours.config, nested(params))
  convert(tmp_path / "first", tmp_path / "out", dtype=dtype)
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  want = params["lm_head", "kernel"].astype(np.float32).astype(wanted).T
  np.testing.assert_array_equal(tensors["lm_head.weight"], want, strict=True)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == np.dtype(wanted).name


def nested(params):
  tree = {}
  for (*parents, name), array in params.items():
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = array
  return tree


def test_mixed_dtypes_become_float32(model, tmp_path):
  ours = load_model(model)
  params = {path: array.astype(jnp.bfloat16 if array.ndim > 1 else np.float32) for path, array in flat(ours.params)}
  save(tmp_path / "first", ours.config, nested(params))
  convert(tmp_path / "first", tmp_path / "out")
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


def broken(model, directory, change):
  ours = load_model(model)
  params = {path: array.copy() for path, array in flat(ours.params)}
  change(params)
  return save(directory, ours.config, nested(params))


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda p: p["norm", "weight"].__setitem__(0, np.nan), "norm.weight holds numbers that are not finite"),
    (lambda p: p.pop(("norm", "weight")), "norm/weight is missing"),
    (lambda p: p.update({("norm", "gain"): np.ones(3)}), "norm/gain is of no use to it"),
    (lambda p: p.update({("norm", "weight"): np.ones(3)}), "norm/weight has shape (3,), wanted (48,)"),
    (lambda p: p.update({("norm", "weight"): np.ones(48, np.int32)}), "norm.weight has dtype int32"),
  ],
)  # fmt: skip
def test_parameters_that_are_not_the_model_s_are_refused(model, change, said, tmp_path):
  source = broken(model, tmp_path / "first", change)
  with pytest.raises(ValueError) as caught:
    convert(source, tmp_path / "out")
  assert said in str(caught.value)
  assert {path.name for path in tmp_path.iterdir()} == {"first"}


def test_a_damaged_checkpoint_is_named_and_leaves_nothing(model, tmp_path):
  shutil.copytree(model, tmp_path / "first")
  largest = max((tmp_path / "first" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  with pytest.raises(ValueError, match=r"first/params: \S+ cannot be read: "):
    convert(tmp_path / "first", tmp_path / "out")
  assert {path.name for path in tmp_path.iterdir()} == {"first"}


def test_arguments(model, tmp_path):
  with pytest.raises(ConversionError, match="format='gguf': wanted one of transformers, openlm"):
    convert(model, tmp_path / "out", format="gguf")
  with pytest.raises(ConversionError, match="dtype='int8': wanted one of float32, bfloat16"):
    convert(model, tmp_path / "out", dtype="int8")
  with pytest.raises(FileNotFoundError, match="is not a supra_jax model"):
    convert(tmp_path, tmp_path / "out")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "precious").touch()
  with pytest.raises(FileExistsError, match="already exists"):
    convert(model, tmp_path / "out")
  assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.compat
def test_program_and_a_file_that_cannot_be_written(model, tmp_path):
  command = ["convert_weights.orbax_to_hf", f"--source={model}", f"--output={tmp_path / 'out'}"]
  done = programs.run(*command, "--dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  assert "100%" in done.stderr and "00:00" in done.stderr
  assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
  shutil.rmtree(tmp_path / "out")
  limited = (
    "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); "
    "runpy.run_module('convert_weights.orbax_to_hf', run_name='__main__')"
  )
  command = [sys.executable, "-c", limited, *command[1:]]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
  assert f"{tmp_path / 'out'} could not be written: File too large. It takes" in done.stderr
  assert not any(tmp_path.iterdir())
