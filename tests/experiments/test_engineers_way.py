"""The way of an engineer: what is drawn has the releases' shapes and ids, and every command of the way works."""

import json
import math

import pytest

from benchmarks import random_releases
from convert_weights.hf_config import model_config
from supra_jax.core.amounts import parse_bytes
from supra_jax.model.presets import PRESETS
from tests.support import programs

RELEASES = random_releases.RELEASES
# From the releases' own tokenizer.json.
IDS = {
  "llama_3_2_1b": {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009, "<|reserved_special_token_247|>": 128_255},
  "qwen3_0_6b": {"<|endoftext|>": 151_643, "<|im_end|>": 151_645, "<tool_call>": 151_657, "</think>": 151_668},
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_its_preset(name):
  release = RELEASES[name]
  assert model_config(release.config, release.generation, "config.json") == PRESETS[name]()


@pytest.mark.parametrize("name", RELEASES)
def test_special_tokens_have_the_ids_of_the_release(name):
  tokenizer = random_releases.release_tokenizer(RELEASES[name])
  assert {token: tokenizer.token_to_id(token) for token in IDS[name]} == IDS[name]
  begins = [IDS[name]["<|begin_of_text|>"]] if name == "llama_3_2_1b" else []
  encoded = tokenizer.encode("of 2024 unused3500")
  assert encoded.ids[: len(begins)] == begins
  assert tokenizer.decode(encoded.ids) == "of 2024 unused3500"
  assert max(encoded.ids[len(begins) :]) < random_releases.LEARNED


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_the_whole_way(name, tmp_path):
  output = tmp_path / "way.json"
  size = {"llama_3_2_1b": "600kB", "qwen3_0_6b": "1200kB"}[name]
  how = ["--layers=2", "--narrower=16", "--tokens=128", f"--state_bytes={size}", f"--release={name}"]
  ran = programs.run("benchmarks.engineers_way", f"--workdir={tmp_path / 'way'}", f"--output={output}", *how)
  assert ran.returncode == 0, ran.stderr
  said = {step["step"]: step["said"] for step in json.loads(output.read_text())["steps"]}
  assert len(said) == 11 and not (tmp_path / "way").exists()
  assert "| load in transformers | `python -m benchmarks.load_export" in ran.stdout
  state = int(said["linearize"].split(" bytes of state")[0].split("; ")[-1].replace(",", ""))
  assert 0.9 * parse_bytes(size) < state <= parse_bytes(size)
  assert said["plan"].startswith("fits: ")
  # A random model gives all tokens about the same probability.
  loss = float(said["evaluate"].split()[1])
  assert loss == pytest.approx(math.log(RELEASES[name].config["vocab_size"]), abs=0.3)
