"""GGUF files: tensors, the permutation of q and k, metadata, tokenizer, and what is refused."""

import json
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_checkpoints import (
  BYTE_TOKENS,
  HEADS,
  KV_HEADS,
  copy_case,
  leaf,
  permute,
  source_tensors,
  split_gguf,
  write_gguf,
)

from convert_weights.errors import ConversionError
from convert_weights.gguf_file import open_gguf
from convert_weights.gguf_source import _unpermute, model_config
from convert_weights.hf_to_orbax import convert
from convert_weights.open_source import open_source
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import RopeConfig
from supra_jax.storage.model_directory import load_model

TOKENS = ["<|start|>", "<|end|>", "ab", "abc", "Ġa", *BYTE_TOKENS]


def converted(path, tmp_path, dtype=None):
  convert(path, tmp_path / "out", dtype)
  return load_model(tmp_path / "out")


def refuse(path, tmp_path, fragment):
  with pytest.raises(ConversionError) as caught:
    convert(path, tmp_path / "out")
  assert fragment in str(caught.value) and str(path) in str(caught.value), str(caught.value)
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*partial*"))


@pytest.mark.compat
def test_same_parameters_as_the_huggingface_directory(tmp_path):
  convert(copy_case("llama_gqa_tied", tmp_path / "hf"), tmp_path / "from_hf")
  wanted = load_model(tmp_path / "from_hf")
  model = converted(write_gguf(tmp_path / "m.gguf"), tmp_path)
  assert model.config == wanted.config.replace(bos_token_id=None, eos_token_ids=())
  for layer in ("layers_0", "layers_1"):
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
      path = f"{layer}/self_attn/{name}/kernel"
      np.testing.assert_array_equal(leaf(model.params, path), leaf(wanted.params, path), err_msg=path)
    for path in (f"{layer}/mlp/{name}/kernel" for name in ("gate_proj", "up_proj", "down_proj")):
      np.testing.assert_array_equal(leaf(model.params, path), leaf(wanted.params, path), err_msg=path)
  np.testing.assert_array_equal(
    leaf(model.params, "embed_tokens/embedding"), leaf(wanted.params, "embed_tokens/embedding")
  )
  assert set(model.params) == set(wanted.params)
  assert model.source["kind"] == "gguf" and model.source["config"]["llama.block_count"] == 2


@pytest.mark.parametrize("shape", [(48, 5), (48,)])
@pytest.mark.parametrize("heads", [HEADS, KV_HEADS])
def test_unpermute_undoes_permute(heads, shape):
  array = np.arange(np.prod(shape)).reshape(shape)
  permuted = permute(array, heads)
  np.testing.assert_array_equal(_unpermute(permuted, heads), array)
  assert (permuted != array).any()


@pytest.mark.compat
def test_quantised(tmp_path):
  # down_proj has rows of 64; Q8_0 and Q4_1 want rows of 32, so the others, of 48, stay as they are.
  path = write_gguf(tmp_path / "m.gguf", quantisation={"ffn_down": Kind.Q4_1, "attn_v": Kind.F16, "attn_k": Kind.BF16})
  model = converted(path, tmp_path)
  tensors = source_tensors("llama_gqa_tied")
  down = tensors["model.layers.1.mlp.down_proj.weight"]
  wanted = gguf.quants.dequantize(gguf.quants.quantize(down, Kind.Q4_1), Kind.Q4_1)
  got = leaf(model.params, "layers_1/mlp/down_proj/kernel")
  np.testing.assert_array_equal(got, wanted.T, strict=True)
  # Fifteen steps from the least to the greatest of a block, half a step off at most.
  assert 0 < np.abs(got.T - down).max() < 0.07 * np.abs(down).max()
  value = tensors["model.layers.0.self_attn.v_proj.weight"]
  got = leaf(model.params, "layers_0/self_attn/v_proj/kernel")
  np.testing.assert_array_equal(got, value.astype(np.float16).astype(np.float32).T, strict=True)
  key = np.asarray(jnp.asarray(tensors["model.layers.0.self_attn.k_proj.weight"]).astype(jnp.bfloat16), np.float32)
  np.testing.assert_array_equal(leaf(model.params, "layers_0/self_attn/k_proj/kernel"), key.T, strict=True)
  assert model.source["stored_types"] == ["BF16", "F16", "F32", "Q4_1"] and model.source["dtype"] == "float32"


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q8_0])
def test_rows_alone(tmp_path, kind):
  stored = open_gguf(write_gguf(tmp_path / "m.gguf", quantisation={"ffn_down": kind})).tensors
  assert stored["blk.0.ffn_down.weight"].dtype == (jnp.bfloat16 if kind == Kind.BF16 else np.float32)
  for name in ("blk.0.ffn_down.weight", "output_norm.weight"):
    np.testing.assert_array_equal(stored[name].read_rows(5, 11), stored[name].read()[5:11], strict=True)


def test_quantised_to_8_bits_in_bfloat16(tmp_path):
  path = write_gguf(tmp_path / "m.gguf", quantisation={"ffn_down": Kind.Q8_0})
  model = converted(path, tmp_path, "bfloat16")
  down = source_tensors("llama_gqa_tied")["model.layers.0.mlp.down_proj.weight"]
  wanted = jnp.asarray(gguf.quants.dequantize(gguf.quants.quantize(down, Kind.Q8_0), Kind.Q8_0)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(leaf(model.params, "layers_0/mlp/down_proj/kernel"), wanted.T, strict=True)


def test_untied(tmp_path):
  unembedding = np.random.default_rng(0).standard_normal((97, 48), np.float32)
  model = converted(write_gguf(tmp_path / "m.gguf", extra={"output.weight": unembedding}), tmp_path)
  assert not model.config.tie_embeddings
  np.testing.assert_array_equal(leaf(model.params, "lm_head/kernel"), unembedding.T)


def test_biases_of_q_and_k_are_permuted_too(tmp_path):
  rng, extra, wanted = np.random.default_rng(0), {}, {}
  for layer in range(2):
    for name, heads, width in (("q", HEADS, 48), ("k", KV_HEADS, 16), ("v", None, 16)):
      bias = rng.standard_normal(width, np.float32)
      wanted[f"layers_{layer}/self_attn/{name}_proj/bias"] = bias
      extra[f"blk.{layer}.attn_{name}.bias"] = permute(bias, heads) if heads else bias
  model = converted(write_gguf(tmp_path / "m.gguf", extra=extra), tmp_path)
  assert model.config.qkv_bias and not model.config.output_bias
  for path, bias in wanted.items():
    np.testing.assert_array_equal(leaf(model.params, path), bias, err_msg=path)


@pytest.mark.parametrize(
  "metadata, changes",
  [
    ({"rope.freq_base": None}, {}),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope": RopeConfig(1e4, "linear", 4.0)}),
    ({"rope.scaling.factor": 4.0}, {"rope": RopeConfig(1e4, "linear", 4.0)}),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    ({"rope.scale_linear": 2.0}, {"rope": RopeConfig(1e4, "linear", 2.0)}),
    ({"attention.key_length": 8, "attention.value_length": 8, "expert_count": 0}, {}),
    ({"attention.layer_norm_rms_epsilon": 1e-6}, {"norm_eps": 1e-6}),
    ({"context_length": None}, {"max_positions": None}),
    ({"rope.scaling.finetuned": True, "rope.scaling.original_context_length": 64}, {}),
    ({"tensor_data_layout": "Meta AI original pth", "rope.scaling.attn_factor": 1.0}, {}),
  ],
)
def test_metadata(tmp_path, metadata, changes):
  plain = load_config(write_gguf(tmp_path / "plain.gguf"))
  assert plain.norm_eps == 1e-5
  assert load_config(write_gguf(tmp_path / "m.gguf", metadata=metadata)) == plain.replace(**changes)


def load_config(path):
  return model_config(open_gguf(path), str(path))


@pytest.mark.parametrize(
  "metadata, fragment",
  [
    ({"expert_count": 8}, "llama.expert_count=8"),
    ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope'"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5}, "attn_factor=0.5"),
    ({"rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
    ({"logit_scale": 0.5}, "llama.logit_scale=0.5"),
    ({"attention.causal": False}, "llama.attention.causal=False: only True"),
    ({"attention.sliding_window": 16}, "llama.attention.sliding_window=16"),
    ({"embedding_length": None}, "llama.embedding_length: missing"),
    ({"attention.head_count": "six"}, "llama.attention.head_count='six'"),
    ({"block_count": 2**31}, "llama.block_count=2147483648"),
    ({"feed_forward_length": 65}, "ffn_up.weight: wanted [65, 48], got [64, 48]"),
    ({"attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon: missing"),
  ],
)
def test_refused_metadata(tmp_path, metadata, fragment):
  refuse(write_gguf(tmp_path / "m.gguf", metadata=metadata), tmp_path, fragment)


@pytest.mark.parametrize(
  "arguments, fragment",
  [
    ({"drop": ("blk.1.attn_q.weight",)}, "missing tensors (1):\n  blk.1.attn_q.weight [48, 48]"),
    ({"extra": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "unknown tensors (1):\n  blk.0.attn_q_norm"),
    ({"extra": {"rope_freqs.weight": np.array([1, 2, 3, 8], np.float32)}}, "rope_freqs.weight: these divide the freq"),
    (
      {"extra": {"rope_freqs.weight": np.ones(4, np.float32)}, "metadata": {"attention.key_length": "eight"}},
      "llama.attention.key_length='eight': wanted a positive int",
    ),
    ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "rope_freqs.weight: wanted 4 factors, got F32 [3]"),
    (
      {"drop": ("output_norm.weight",), "extra": {"output_norm.weight": np.ones(48, np.int8)}},
      "output_norm.weight: I8",
    ),
    ({"tokens": TOKENS, "metadata": {"vocab_size": None}}, "token_embd.weight: wanted [261, 48], got [97, 48]"),
  ],
)
def test_refused_tensors(tmp_path, arguments, fragment):
  refuse(write_gguf(tmp_path / "m.gguf", **arguments), tmp_path, fragment)


def write_one_tensor(path, architecture, tensor, array, kind=None):
  writer = gguf.GGUFWriter(path, architecture)
  if kind is not None:
    writer.add_type(kind)
  writer.add_tensor(tensor, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_other_architecture(tmp_path):
  path = write_one_tensor(tmp_path / "m.gguf", "gemma", "token_embd.weight", np.ones((2, 2), np.float32))
  refuse(path, tmp_path, "general.architecture='gemma'")


def test_an_adapter_is_no_model(tmp_path):
  array = np.zeros((4, 8), np.float32)
  path = write_one_tensor(tmp_path / "m.gguf", "llama", "blk.0.attn_q.weight.lora_a", array, kind="adapter")
  refuse(path, tmp_path, "general.type='adapter': wanted a model (merge an adapter into its base model)")


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 1000, 3000, -1, -5000])
def test_truncated(tmp_path, keep):
  path = write_gguf(tmp_path / "m.gguf", tokens=TOKENS[:97])
  path.write_bytes(path.read_bytes()[:keep])
  refuse(path, tmp_path, "truncated" if keep not in (0, 3) else "not a GGUF file")


def test_every_cut_and_every_flipped_byte_of_a_header_is_handled(tmp_path):
  """A damaged header ends in a ConversionError or a readable file: no crash, no endless loop, no huge allocation."""
  path = write_gguf(tmp_path / "m.gguf")
  raw = path.read_bytes()
  header_bytes = raw.index(b"blk.1.ffn_down.weight") + 100
  damaged = tmp_path / "damaged.gguf"
  for position in range(0, header_bytes, 3):
    for contents in (raw[:position], raw[:position] + b"\xff" + raw[position + 1 :]):
      damaged.write_bytes(contents)
      try:
        open_gguf(damaged)
      except ConversionError as error:
        assert str(damaged) in str(error)


def test_lists_within_lists(tmp_path):
  """Each takes 12 bytes; read by recursion they would end Python's stack."""
  deep = struct.pack("<IQ", 9, 1) * 100_000
  header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q3sI", 3, b"key", 9)
  (tmp_path / "m.gguf").write_bytes(header + deep)
  refuse(tmp_path / "m.gguf", tmp_path, "lists within lists")


@pytest.mark.parametrize(
  "offset, value, fragment",
  [(0, b"GGML", "not a GGUF file"), (4, struct.pack("<I", 1), "version 1"), (4, struct.pack(">I", 3), "big-endian")],
)
def test_magic_and_version(tmp_path, offset, value, fragment):
  path = write_gguf(tmp_path / "m.gguf")
  raw = bytearray(path.read_bytes())
  raw[offset : offset + 4] = value
  path.write_bytes(raw)
  refuse(path, tmp_path, fragment)


def test_directory_with_one_gguf(tmp_path):
  (tmp_path / "model").mkdir()
  write_gguf(tmp_path / "model" / "a.gguf")
  assert converted(tmp_path / "model", tmp_path).config.num_heads == HEADS
  write_gguf(tmp_path / "model" / "b.gguf")
  with pytest.raises(ConversionError, match=r"give one of its files\.\nGGUF models \(2\):\n  a\.gguf\n  b\.gguf"):
    convert(tmp_path / "model", tmp_path / "other")


def test_a_config_json_of_the_hub_beside_it(tmp_path):
  (tmp_path / "model").mkdir()
  path = write_gguf(tmp_path / "model" / "a.gguf")
  (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
  assert open_source(tmp_path / "model").weight_files == [path]


@pytest.mark.parametrize("given", ["", "m-00001-of-00003.gguf", "m-00002-of-00003.gguf"])
def test_parts(tmp_path, given):
  whole = with_vocabulary(tmp_path / "m.gguf", TOKENS)
  (tmp_path / "model").mkdir()
  parts = split_gguf(whole, tmp_path / "model" / "m", 3)
  got, want = open_source(tmp_path / "model" / given), open_source(whole)
  assert got.config == want.config and got.tokenizer_files == want.tokenizer_files
  assert list(got.weight_files) == parts
  for ours, theirs in zip(got.leaves, want.leaves, strict=True):
    assert ours.path == theirs.path
    np.testing.assert_array_equal(ours.read(), theirs.read(), strict=True, err_msg=str(ours.path))


def test_parts_that_do_not_fit(tmp_path):
  (tmp_path / "model").mkdir()
  parts = split_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "model" / "m", 3)
  other = parts[1].read_bytes()
  parts[1].unlink()
  for given in (parts[0], parts[2], tmp_path / "model"):
    with pytest.raises(ConversionError, match=r"missing parts \(1\):\n  m-00002-of-00003\.gguf"):
      convert(given, tmp_path / "out")
  parts[1].write_bytes(parts[2].read_bytes())
  refuse_part = r"m-00002-of-00003\.gguf: split\.no=2, split\.count=3: its name says that it is part 2 of 3"
  with pytest.raises(ConversionError, match=refuse_part):
    convert(parts[0], tmp_path / "out")
  (tmp_path / "second.gguf").write_bytes(other)
  refuse(tmp_path / "second.gguf", tmp_path, "split.no=1, split.count=3: its name says that it is part 1 of 1")


def with_vocabulary(path, tokens, **arguments):
  """A file whose embedding has a row a token."""
  embedding = np.random.default_rng(0).standard_normal((len(tokens), 48), np.float32)
  extra = {"token_embd.weight": embedding}
  metadata = {"vocab_size": len(tokens)}
  return write_gguf(path, drop=("token_embd.weight",), extra=extra, metadata=metadata, tokens=tokens, **arguments)


def test_tokenizer(tmp_path):
  model = converted(with_vocabulary(tmp_path / "m.gguf", TOKENS), tmp_path)
  assert (model.config.bos_token_id, model.config.eos_token_ids) == (0, (1,))
  tokenizer = Tokenizer.from_files(model.tokenizer_files, model.config)
  one, dot = TOKENS.index("1"), TOKENS.index(".")
  assert tokenizer.encode("abc11. a<|end|>") == [3, one, one, dot, 4, 1]
  assert tokenizer.encode("ab", bos=True) == [0, 2]
  text = "Zürich, 日本 🤖\n\n7."
  assert tokenizer.decode(tokenizer.encode(text)) == text
  settings = json.loads(model.tokenizer_files["tokenizer_config.json"])
  assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")


@pytest.mark.parametrize(
  "arguments, fragment",
  [
    ({"pre": "falcon"}, "tokenizer.ggml.pre='falcon': the pre-tokenizer 'falcon' is not supported: only gpt-2, smollm"),
    ({"pre": "default"}, "tokenizer.ggml.pre='default'"),
    ({"model": "llama"}, "tokenizer.ggml.scores: wanted a list of float"),
    ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported: only 'gpt2'"),
    ({"tokens": [*TOKENS, "ab"]}, "tokens are listed twice"),
    ({"tokens": [t for t in TOKENS if t != "abc"]}, "the merge 'ab c' names tokens"),
  ],
)
def test_refused_tokenizers(tmp_path, arguments, fragment):
  path = with_vocabulary(tmp_path / "m.gguf", **({"tokens": TOKENS} | arguments))
  refuse(path, tmp_path, fragment)
  refuse(path, tmp_path, "give --tokenizer=DIR")
  # Which is not looked at where another takes its place.
  files = open_source(with_vocabulary(tmp_path / "good.gguf", TOKENS)).tokenizer_files
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(files["tokenizer.json"])
  assert open_source(path, tmp_path / "tokenizer").tokenizer_files == {"tokenizer.json": files["tokenizer.json"]}
  assert open_source(path, own_tokenizer=False).tokenizer_files == {}
  # Ids that end a text are with the tokenizer, where the file has none.
  (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": TOKENS[1]}))
  silent = write_gguf(tmp_path / "silent.gguf")
  assert open_source(silent).config.eos_token_ids == ()
  assert open_source(silent, tmp_path / "tokenizer").config.eos_token_ids == (1,)
