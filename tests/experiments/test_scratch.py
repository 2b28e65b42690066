"""A model from scratch: drawn as OpenLM draws one, for any tokenizer, and then trained as any other."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import scratch, tiny
from supra_jax.model.presets import PRESETS
from supra_jax.storage.model_directory import load_model
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENIZER = Tokenizer.from_files({"tokenizer.json": tiny.tokenizer_json()}, tiny.tiny_config("supra"))
WIDE = {"hidden_size": 256, "num_heads": 4, "num_layers": 3, "intermediate_size": 512, "tie_embeddings": False}


@pytest.fixture(scope="module")
def drawn():
  config = scratch.config_of("two_cores", "supra", TOKENIZER, WIDE)
  return config, scratch.draw(config, 0)


def test_the_spread_is_that_of_open_lm(drawn):
  config, params = drawn
  assert (config.hidden_size, config.head_dim, config.num_kv_heads, config.num_layers) == (256, 64, 4, 3)
  # torch.nn.init.trunc_normal_(std=s, a=-3s, b=3s) of s = 1 has this deviation.
  density = math.exp(-4.5) / math.sqrt(2 * math.pi)
  cut = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))

  def spread(x):
    assert abs(x).max() <= 3 * x.std() / cut * 1.01 and abs(x.mean()) < 0.1 * x.std()
    return float(x.std()) / cut

  for name in ("embed_tokens", "lm_head"):
    (leaf,) = params[name].values()
    assert spread(leaf) == pytest.approx(1 / 16, rel=0.02)
  for number in range(3):
    layer = params[f"layers_{number}"]
    deep = math.sqrt(2 * (number + 1))
    for name in ("q_proj", "k_proj", "v_proj"):
      assert spread(layer["self_attn"][name]["kernel"]) == pytest.approx(1 / 16, rel=0.02)
    assert spread(layer["self_attn"]["o_proj"]["kernel"]) == pytest.approx(1 / 16 / deep, rel=0.02)
    for name in ("gate_proj", "up_proj"):
      assert spread(layer["mlp"][name]["kernel"]) == pytest.approx(1 / 16, rel=0.02)
    assert spread(layer["mlp"]["down_proj"]["kernel"]) == pytest.approx(512**-0.5 / deep, rel=0.02)
    assert (layer["input_layernorm"]["weight"] == 1).all()
    # phi is torch's linear layer: uniform.
    phi = layer["self_attn"]["feature_map"]["kernel"]
    assert abs(phi).max() <= 1 / 16 and phi.std() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
  kernels = [np.asarray(params[f"layers_{n}"]["self_attn"]["q_proj"]["kernel"]).ravel()[:9] for n in range(3)]
  assert len({tuple(kernel) for kernel in kernels}) == 3


def test_a_seed_is_a_model(drawn):
  config, params = drawn
  assert jax.tree.all(jax.tree.map(np.array_equal, scratch.draw(config, 0), params))
  other = scratch.draw(config, 1)
  assert not np.array_equal(other["lm_head"]["kernel"], params["lm_head"]["kernel"])


def test_presets_are_small_or_the_paper_s():
  sizes = {}
  for mixer in ("softmax", "supra"):
    config = scratch.config_of("two_cores", mixer, TOKENIZER, {"vocab_size": 4096})
    sizes[mixer] = sum(leaf.size for leaf in jax.tree.leaves(scratch.draw(config, 0)))
  assert max(sizes.values()) <= 3_000_000
  assert PRESETS["open_lm_1b"]("supra").num_layers == 24


def test_the_program(tmp_path):
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer/tokenizer.json").write_bytes(tiny.tokenizer_json())
  (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": tiny.END}))
  flags = ["--preset=two_cores", f"--tokenizer={tmp_path}/tokenizer", f"--output={tmp_path}/model", "--seed=3"]
  changes = "--set=hidden_size=64,num_heads=2,num_layers=2,intermediate_size=128"
  ran = programs.run("supra_jax.bin.init", *flags, changes, "--mixer=supra_window")
  assert ran.returncode == 0, ran.stderr
  model = load_model(tmp_path / "model")
  assert f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,} parameters, 2 layers" in ran.stdout
  assert (model.config.vocab_size, model.config.eos_token_ids, model.config.head_dim) == (320, (0,), 32)
  assert model.source["drawn"] == {"preset": "two_cores", "seed": 3} and set(model.config.mixers) == {"supra_window"}
  assert supra_jax.load(tmp_path / "model").generate("A", max_new_tokens=3) is not None
  again = programs.run("supra_jax.bin.init", *flags)
  assert again.returncode == 1 and "already exists" in again.stderr


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"hiden_size": 64}, "hiden_size: no field of a model"),
    ({"hidden_size": 65}, "hidden_size=65 is not divisible by num_heads=3: give head_dim"),
    ({"norm": "best"}, "norm"),
    ({"hidden_size": "abc"}, "hidden_size='abc': wanted a positive whole number"),
    ({"num_heads": 0}, "num_heads=0: wanted a positive whole number"),
    ({"num_layers": 2.7}, r"num_layers=2.7: wanted a positive whole number"),
    ({"eos_token_ids": 5}, "eos_token_ids: wanted a list, got 5"),
    ({"tie_embeddings": "yes"}, "tie_embeddings: wanted bool, got 'yes'"),
    ({"vocab_size": 100}, "vocab_size=100: the tokenizer has ids up to 319"),
    ({"bos_token_id": 100_000}, "bos_token_id=100000: wanted ids below vocab_size=320"),
  ],
)
def test_what_is_no_shape(changes, said):
  with pytest.raises(ValueError, match=said):
    scratch.config_of("two_cores", "supra", TOKENIZER, changes)


def test_a_width_that_heads_do_not_divide_is_one_for_mamba_which_has_none():
  assert scratch.config_of("two_cores", "mamba", TOKENIZER, {"hidden_size": 50}).hidden_size == 50
