"""Exports in the current transformers and in 4.57, and what peft, Trainer and torch.compile make of them in both."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import peers  # noqa: E402
import tokenizer_kinds  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import supra_jax  # noqa: E402
from convert_weights import hf_export, hf_to_orbax, names  # noqa: E402
from convert_weights.orbax_to_hf import convert  # noqa: E402
from convert_weights.tokenizer_probe import hard_texts  # noqa: E402
from supra_jax.model.config import RopeConfig  # noqa: E402
from supra_jax.model.presets import tiny  # noqa: E402
from supra_jax.model.registry import layer, layers  # noqa: E402
from supra_jax.storage.model_directory import load_model, save_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = ("Hello there", "<|im_start|>hi<|im_end|> yo", *hard_texts()[::20])
# Made by the Makefile; beside the same torch.
TRANSFORMERS_4 = Path(sys.prefix) / "transformers-4"

BASE = tiny("softmax").replace(layers=layers(("softmax",)), max_positions=64)
FAMILIES = {
  "llama": BASE.replace(qkv_bias=True, output_bias=True),
  "mistral": BASE.replace(sliding_window=16),
  "qwen2": BASE.replace(qkv_bias=True, sliding_window=16),
  "qwen3": BASE.replace(qk_norm="head", head_dim=16),
}
YARN = RopeConfig(1e6, "yarn", 4.0, original_max_positions=16, attention_factor=1.2, beta_fast=4.0, beta_slow=0.5)
ROPES = {
  "llama3": RopeConfig(5e5, "llama3", 4.0, original_max_positions=16),
  "linear": RopeConfig(5e5, "linear", 4.0),
  "theta": RopeConfig(5e5),
  "yarn": dataclasses.replace(YARN, truncate=False),
  "yarn, truncated": YARN,
}
MEMORY = layer("memory", window=3, retained=(6, 2), sinks=1, chunk=7, state_dtype="float32")
# Each family with a RoPE of its own, and what has our code.
CONVERTED = {
  **{
    family: config.replace(rope=rope) for (family, config), rope in zip(FAMILIES.items(), ROPES.values(), strict=False)
  },
  "supra": tiny().replace(layers=layers(("supra",)), rope=YARN),
  "window": tiny().replace(
    layers=(*layers(("supra", "supra_window"), window=9, sinks=3), MEMORY),
    max_positions=20,
    eos_token_ids=(2, 3),
    rope=ROPES["llama3"],
  ),
  "hybrid": tiny().replace(
    layers=layers(("softmax", "supra_window"), feature_map="per_head", window=5, sinks=0),
    sliding_window=12,
    rope=ROPES["yarn"],
  ),
}
# The same weights with all others.
OTHERS = {f"{f}, {r}": (f, CONVERTED[f].replace(rope=rope)) for f in FAMILIES for r, rope in ROPES.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, random_params, exported_code):
  """Of all exports."""
  directory = tmp_path_factory.mktemp("peers")
  for name, config in CONVERTED.items():
    save_model(directory / name / "orbax", config=config, params=random_params(config), tokenizer_files={}, source={})
    convert(directory / name / "orbax", directory / name / "hf")
  for name, (family, config) in OTHERS.items():
    copy = shutil.copytree(directory / family / "hf", directory / name / "hf")
    (copy / "config.json").write_text(json.dumps({**hf_export.export(config).config, "dtype": "float32"}))
  tokenizer_kinds.write(directory / "tokenizers", texts_json=json.dumps(TEXTS))
  return directory


@pytest.fixture(scope="module")
def tokenizers(directory):
  """By name, those that the exports in `tokenizers` were made of."""
  return tokenizer_kinds.exports(directory / "tokenizers")


@pytest.fixture(scope="module")
def child(directory, tokenizers):
  """The process of transformers 4; None where that is not installed."""
  if not TRANSFORMERS_4.exists():
    yield None
    return
  environment = os.environ | {"PYTHONPATH": str(TRANSFORMERS_4), "HF_MODULES_CACHE": str(directory / "modules-4")}
  with subprocess.Popen(
    [sys.executable, peers.__file__, str(directory)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  ) as process:
    yield process
    process.kill()


@pytest.fixture(scope="module")
def now(child, directory):
  """({model: logits}, warnings) of the current release; the child works meanwhile."""
  return peers.read_all(directory)


@pytest.fixture(scope="module")
def before(child, directory):
  """({model: logits}, what else it said) of transformers 4.57."""
  if child is None:
    pytest.skip(f"transformers 4.57 is not in {TRANSFORMERS_4}; the Makefile puts it there on Python 3.11.")
  output, _ = child.communicate(timeout=600)
  assert child.returncode == 0, output.decode()
  said = json.loads((directory / "said.json").read_text())
  assert said["version"].startswith("4.57.")
  return dict(np.load(directory / "logits.npz")), said


def assert_close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, "window"])
def test_logits_are_ours(name, now, directory):
  logits, _ = now
  ours, _ = supra_jax.load(directory / name / "orbax")(peers.TOKENS.numpy())
  assert_close(logits[name], ours)


def assert_comes_back(saved, directory):
  """The parameters that Trainer saved are ours again, bit for bit."""
  hf_to_orbax.convert(saved, directory)
  model, tensors = load_model(directory), load_file(saved / "model.safetensors")
  assert model.config == CONVERTED[peers.TOOLS_MODEL]
  for parameter in names.parameters(model.config):
    leaf = functools.reduce(lambda node, key: node[key], parameter.path, model.params)
    want = tensors[parameter.hf]
    np.testing.assert_array_equal(leaf, want.swapaxes(-1, -2) if parameter.transposed else want, strict=True)


@pytest.mark.parametrize("tool", peers.TOOLS)
def test_tools(tool, now, directory, tmp_path):
  if "lora" in tool:
    pytest.importorskip("peft")
  saved = peers.TOOLS[tool](directory / peers.TOOLS_MODEL / "hf")
  if saved is not None:
    assert_comes_back(saved, tmp_path / "back")


def test_transformers_4_reads_all_alike(now, before):
  assert now[0].keys() == before[0].keys() == CONVERTED.keys() | OTHERS.keys()
  for name, logits in now[0].items():
    assert_close(before[0][name], logits)
  assert now[1] == before[1]["warnings"] == []


def test_transformers_4_encodes_alike(before, tokenizers):
  assert before[1]["ids"] == {name: [ours.encode(text) for text in TEXTS] for name, ours in tokenizers.items()}


@pytest.mark.parametrize("tool", [name for name in peers.TOOLS if name != "compiled"])
def test_tools_of_transformers_4(tool, before, tmp_path):
  if "lora" in tool:
    pytest.importorskip("peft")
  assert tool not in before[1]["failed"], before[1]["failed"][tool]
  saved = before[1]["saved"][tool]
  if saved is not None:
    assert_comes_back(Path(saved), tmp_path / "back")
