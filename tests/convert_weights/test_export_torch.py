"""What transformers makes of an exported directory, against our own model."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_exports import carried, close, exported, load, tokens_of  # noqa: E402

import supra_jax  # noqa: E402
from convert_weights.orbax_to_hf import convert  # noqa: E402
from supra_jax.experiments.tiny import write_checkpoint  # noqa: E402
from supra_jax.model.config import RopeConfig  # noqa: E402
from supra_jax.model.mixers.t2r import T2R  # noqa: E402
from supra_jax.model.presets import tiny  # noqa: E402
from supra_jax.model.registry import layer, layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation", "exported_code")

LENGTH = 150  # longer than a chunk of the torch code
BASE = tiny("softmax").replace(layers=layers(("softmax",)))
MODELS = {
  # transformers has classes for these
  "LlamaForCausalLM": BASE.replace(
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    rope=RopeConfig(1e5, "llama3", factor=8.0, original_max_positions=32),
  ),
  "MistralForCausalLM": BASE.replace(sliding_window=16, rope=RopeConfig(scaling="linear", factor=2.0)),
  "Qwen2ForCausalLM": BASE.replace(qkv_bias=True, sliding_window=16),
  "Qwen3ForCausalLM": BASE.replace(
    head_dim=16,
    qk_norm="head",
    rope=RopeConfig(scaling="yarn", factor=4.0, original_max_positions=64, attention_factor=1.2, truncate=False),
  ),
  # and for these not
  "dense": tiny().replace(
    layers=layers(("supra",)),
    tie_embeddings=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    sliding_window=16,
    rope=RopeConfig(1e5, "llama3", factor=8.0, original_max_positions=32),
  ),
  "dense for q and k": tiny().replace(
    layers=layers(("supra",), decay_start=0.5), num_kv_heads=6, rope=RopeConfig(kind="none")
  ),
  "hybrid": tiny().replace(
    layers=layers(("softmax", "supra"), feature_map="per_head", decay="retnet", qk_norm=True),
    sliding_window=9,
    value_head_dim=12,
    norm="layer_norm",
    rope=RopeConfig(kind="interleaved"),
    post_embed_norm=True,
  ),
  "other hybrid": tiny().replace(
    layers=layers(("supra", "softmax"), feature_map="per_head_separate", decay="none"),
    norm="layer_norm_gain",
    qk_norm="head",
    rope=RopeConfig(scaling="yarn", factor=4.0, original_max_positions=64, attention_factor=1.2),
  ),
  "by head": tiny().replace(
    layers=layers(("softmax", "supra")),
    num_heads=4,
    num_kv_heads=4,
    qk_norm="all_heads",
    rope=RopeConfig(kind="by_head"),
  ),
  "window": tiny().replace(
    layers=layers(("supra_window",) * 2, feature_map="per_head", window=9, sinks=3), output_bias=True, value_head_dim=12
  ),
  "sinks beyond the teacher's reach": tiny().replace(
    layers=layers(("supra_window", "softmax"), window=4, sinks=2),
    max_positions=20,
    rope=RopeConfig(kind="interleaved"),
  ),
  "memories of two kinds": tiny().replace(
    layers=(
      layer("memory", window=5, retained=(6, 3), sinks=2, chunk=4, state_dtype="float32"),
      layer("memory", window=1, retained=(0,), sinks=0, chunk=3, state_dtype="float32"),
    ),
    value_head_dim=12,
    qk_norm="all_heads",
    output_bias=True,
  ),
  "memories beyond the teacher's reach": tiny().replace(
    layers=(
      layer("memory", window=2, retained=(3, 9), sinks=1, chunk=2, state_dtype="float32"),
      layer("supra_window", window=4, sinks=2),
      layer("memory", window=7, retained=(5,), sinks=3, chunk=5, state_dtype="float32"),
    ),
    max_positions=29,  # so that token 29 is too far from the last sink before that has the distance of a far token
    rope=RopeConfig(scaling="yarn", factor=4.0, original_max_positions=64, attention_factor=1.2, kind="interleaved"),
  ),
  "a memory of random tokens": tiny().replace(
    layers=(layer("memory", window=3, retained=(5,), chunk=6, score="random", state_dtype="float32"), layer("softmax")),
    sliding_window=30,
    rope=RopeConfig(kind="by_head"),
  ),
  "lolcats": tiny().replace(
    layers=layers(("lolcats", "softmax"), window=9), value_head_dim=12, qk_norm="head", output_bias=True, qkv_bias=True
  ),
  "lolcats whose window is longer than the text": tiny().replace(
    layers=(layer("lolcats", window=LENGTH + 7),) * 2, rope=RopeConfig(kind="by_head")
  ),
  "T2R": tiny().replace(layers=layers(("t2r", "linear_transformer"), **T2R), value_head_dim=12),
  "T2R as in the paper's listing": tiny().replace(
    layers=(
      layer("t2r", rope=False, normaliser="epsilon", qk_norm=True),
      layer("linear_transformer", decay="retnet", normaliser="clamp"),
      layer("linear_transformer", rope=True, decay="lightning"),
      layer("supra", rope=False),
    ),
    qk_norm="head",
    output_bias=True,
  ),
  "windows of two kinds": tiny().replace(
    layers=layers(("softmax", "supra_window"), window=5, sinks=0), sliding_window=20, rope=RopeConfig(kind="by_head")
  ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name, random_params, tmp_path):
  """Read at once, in pieces, token by token, and with padding on either side."""
  config = MODELS[name]
  params = random_params(config)
  model = exported(config, params, tmp_path)
  own = not name.endswith("LM")
  assert type(model).__name__ == ("SupraForCausalLM" if own else name)
  tokens = tokens_of(config, length=LENGTH)
  want, _ = supra_jax.LM(config, params)(tokens)
  tokens = torch.from_numpy(tokens)
  close(model(tokens).logits, want)
  if not own:
    return

  cut = LENGTH - 4
  output = model(tokens[:, :cut], use_cache=True)
  logits = [output.logits]
  for t in range(cut, LENGTH):
    output = model(tokens[:, t : t + 1], use_cache=True, **carried(output))
    logits.append(output.logits)
  close(torch.cat(logits, 1), want)
  # It remembers no more keys than the next token can see.
  (cache,) = carried(output).values()
  for i, (told, mixer) in enumerate(zip(config.layers, config.mixers, strict=True)):
    window = config.sliding_window if mixer == "softmax" else getattr(told, "window", None)
    if window is not None and mixer not in ("memory", "lolcats"):
      count = window - 1 + getattr(told, "sinks", 0)
      assert cache.tensors[i][-1].shape[2] == cache.slots[mixer].shape[1] == count

  # Row 1 is shorter; what follows it then is read with a cache that has seen padding.
  pad = 7
  short = tokens[1:, : LENGTH - pad]
  filler = torch.full((1, pad), 5)
  for side in ("left", "right"):
    row = torch.cat([filler, short] if side == "left" else [short, filler], 1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    real = slice(pad, None) if side == "left" else slice(LENGTH - pad)
    mask[1] = 0
    mask[1, real] = 1
    output = model(torch.cat([tokens[:1], row]), attention_mask=mask, use_cache=True)
    close(output.logits[0], want[0])
    close(output.logits[1, real], want[1, : LENGTH - pad])
    further = model(tokens[1:, LENGTH - pad :].expand(2, -1), use_cache=True, **carried(output))
    close(further.logits[1], want[1, LENGTH - pad :])


GENERATING = {
  "softmax with a window below SUPRA without and with one": layers(("softmax", "supra", "supra_window"), sinks=0),
  "memories": (
    layer("memory", window=3, retained=(5,), sinks=1, chunk=4, state_dtype="float32"),
    layer("memory", window=2, retained=(2,), sinks=0, chunk=3, state_dtype="float32"),
  ),
  "lolcats": layers(("lolcats",) * 2, window=3),
  "normalised": layers(("t2r", "linear_transformer"), rope=False),
}


@pytest.fixture(scope="module", params=GENERATING)
def generating(request, tmp_path_factory):
  """(our model, theirs, its directory), with a tokenizer."""
  directory = tmp_path_factory.mktemp("generating")
  write_checkpoint(directory / "orbax", "supra", layers=GENERATING[request.param], sliding_window=8)
  convert(directory / "orbax", directory / "hf")
  return supra_jax.load(directory / "orbax"), load(directory / "hf"), directory / "hf"


def test_generate_is_ours(generating):
  ours, theirs, directory = generating
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
  texts = ["A function is", "The for statement is used to iterate over the elements of a sequence"]
  ids = [tokenizer(text)["input_ids"] for text in texts]
  assert ids == [ours.tokenizer.encode(text) for text in texts]
  tokenizer.pad_token_id, tokenizer.padding_side = 0, "left"
  batch = tokenizer(texts, return_tensors="pt", padding=True)
  how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
  new = theirs.generate(**batch, **how)
  assert new.tolist() == theirs.generate(**batch, **how, use_cache=False).tolist()
  logits, _ = ours(new[:, :-1].numpy(), lengths=[len(i) + 11 for i in ids], padding="left")
  np.testing.assert_array_equal(logits[:, -12:].argmax(-1), new[:, -12:])


def test_generate_with_beams_and_many_sequences(generating):
  _, theirs, _ = generating
  prompt = torch.tensor([[5, 6, 7, 8], [90, 80, 70, 60]])
  how = {"max_new_tokens": 10, "pad_token_id": 0, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
  with_cache = theirs.generate(prompt, **how, use_cache=True)
  assert with_cache.tolist() == theirs.generate(prompt, **how, use_cache=False).tolist()


def test_generate_goes_on(generating):
  """A text in two calls, the second given all tokens or the new ones, is the text in one."""
  _, theirs, _ = generating
  prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
  how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
  whole = theirs.generate(prompt, **how, max_new_tokens=9)
  first = theirs.generate(prompt, **how, max_new_tokens=4, return_dict_in_generate=True)
  second = theirs.generate(first.sequences, **how, max_new_tokens=5, **carried(first))
  assert second.tolist() == whole.tolist()


def test_the_model_card_s_load_lines_run(generating, capsys):
  _, _, directory = generating
  (lines,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
  exec(lines.replace("USER/NAME", str(directory)))
  assert "Once upon a time" in capsys.readouterr().out
