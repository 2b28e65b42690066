"""Whatever cannot be converted exactly is refused by name, and leaves nothing behind."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import change_config, copy_case
from tokenizers import Tokenizer, decoders, models

from convert_weights.errors import MAX_LISTED, ConversionError
from convert_weights.hf_to_orbax import convert
from convert_weights.open_source import open_source

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def refuse(source, tmp_path, *fragments):
  """Expects a ConversionError that holds every fragment, and no trace of an output."""
  before = set(tmp_path.iterdir())
  with pytest.raises(ConversionError) as caught:
    convert(source, tmp_path / "out")
  for fragment in fragments:
    assert fragment in str(caught.value), str(caught.value)
  assert set(tmp_path.iterdir()) == before
  return str(caught.value)


def change_tensors(source, change):
  path = source / "model.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


@pytest.fixture
def source(tmp_path):
  return copy_case("mistral_gqa", tmp_path / "source")


@pytest.mark.parametrize(
  "changes, fragment",
  [
    ({"model_type": "gemma"}, "model_type='gemma'"),
    ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures=['LlamaForCausalLM']"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"pretraining_tp": 2}, "pretraining_tp=2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ({"num_local_experts": 8}, "num_local_experts=8"),
    ({"num_experts": 0}, "num_experts=0"),
    ({"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=["),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map="),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: wanted at most"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: missing, yarn scaling needs it"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}}, "beta_fast >= beta_slow"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "rope_parameters.truncate=1"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 0.5}, "base > 1"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 10**400}}, "rope_parameters.factor=1000"),
    (
      {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
      "rope_scaling.type='dynamic': its frequencies depend on the length of the whole text",
    ),
    (
      {"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}},
      "rope_type='longrope': its frequencies change",
    ),
    ({"use_sliding_window": True}, "use_sliding_window=True: unknown key"),
    ({"rope_parameters": {"rope_type": "default", "mscale": 2.0}}, "rope_parameters.mscale=2.0"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor: missing"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention="),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type=3"),
    ({"rope_parameters": [1]}, "rope_parameters=[1]"),
    ({"rope_theta": 5e5}, "given more than once"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
    ({"hidden_size": None}, "hidden_size: missing"),
    ({"hidden_size": "48"}, "hidden_size='48'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"num_key_value_heads": 4}, "does not divide"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
    ({"head_dim": None, "num_attention_heads": 5}, "hidden_size=48: not divisible"),
    ({"bos_token_id": 97}, "bos_token_id=97"),
    ({"bos_token_id": [1, 2]}, "bos_token_id=[1, 2]"),
    ({"eos_token_id": [2, -1]}, "eos_token_id=[2, -1]"),
  ],
)
def test_config(source, tmp_path, changes, fragment):
  change_config(source, **changes)
  refuse(source, tmp_path, fragment, str(source / "config.json"))


def test_config_of_llama_with_a_sliding_window(tmp_path):
  refuse(copy_case("llama_gqa_tied", tmp_path / "source", sliding_window=16), tmp_path, "sliding_window=16")


def test_every_complaint_about_a_config_comes_at_once(source, tmp_path):
  change_config(source, hidden_act="gelu", num_local_experts=8, vocab_size=None)
  refuse(source, tmp_path, "hidden_act='gelu'", "num_local_experts=8", "vocab_size: missing")


@pytest.mark.parametrize("text, fragment", [("{", "not valid JSON"), ("[]", "wanted a JSON object")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json(source, tmp_path, name, text, fragment):
  (source / name).write_text(text)
  refuse(source, tmp_path, str(source / name), fragment)


def test_missing_unknown_and_misshaped_tensors_are_listed(source, tmp_path):
  def change(tensors):
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors[Q_PROJ] = np.ones((48, 47), np.float32)

  change_tensors(source, change)
  refuse(
    source,
    tmp_path,
    "missing tensors (1):\n  model.norm.weight [48]",
    "unknown tensors (1):\n  model.layers.0.self_attn.q_norm.weight [8]",
    f"{Q_PROJ}: wanted [48, 48], got [48, 47]",
  )


def test_long_lists_are_cut(source, tmp_path):
  change_config(source, num_hidden_layers=9)
  message = refuse(source, tmp_path, "missing tensors (63):", "... and 43 more")
  assert len(re.findall(r"^  model\.", message, re.MULTILINE)) == MAX_LISTED


def test_transposed_square_and_swapped_tensors_are_not_confused(source, tmp_path):
  change_tensors(source, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": np.ones((64, 48), np.float32)}))
  refuse(source, tmp_path, "down_proj.weight: wanted [48, 64], got [64, 48]")


def test_integer_tensors(source, tmp_path):
  change_tensors(source, lambda t: t.update({Q_PROJ: np.ones((48, 48), np.int8)}))
  refuse(source, tmp_path, f"type that cannot be read (1):\n  {Q_PROJ}: I8")


@pytest.mark.parametrize("value, dtype, fragment", [(np.nan, None, "not finite"), (1e39, "float32", "too large")])
def test_numbers(source, tmp_path, value, dtype, fragment):
  def change(tensors):
    tensors[Q_PROJ] = tensors[Q_PROJ].astype(np.float64)
    tensors[Q_PROJ][3, 4] = value

  change_tensors(source, change)
  with pytest.raises(ConversionError, match=f"{Q_PROJ} holds numbers .*{fragment}"):
    convert(source, tmp_path / "out", dtype)
  assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unequal_tied_unembedding(tmp_path):
  source = copy_case("llama_gqa_tied", tmp_path / "source")
  change_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
  refuse(source, tmp_path, "the config ties the embeddings", "lm_head.weight differs")


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_safetensors(source, tmp_path, keep):
  path = source / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  refuse(source, tmp_path, str(path), "truncated" if keep not in (0, 5) else "not a safetensors file")


def rewrite_header(path, change):
  raw = path.read_bytes()
  size = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + size])
  text = change(header)
  new = text if isinstance(text, bytes) else json.dumps(header).encode()
  path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def repeat_key(header):
  return json.dumps(header).replace('"__metadata__"', f'"{Q_PROJ}"').encode()


@pytest.mark.parametrize(
  "change, fragment",
  [
    (lambda h: b"{broken}", "corrupt header"),
    (lambda h: b"\xff\xfe", "corrupt header"),
    (lambda h: b"[1, 2]", "wanted a JSON object"),
    (repeat_key, "given twice"),
    (lambda h: h.update(__metadata__={"format": 1}), "__metadata__"),
    (lambda h: h.update(__metadata__=None), "__metadata__"),
    (lambda h: h[Q_PROJ].update(dtype="F12"), "unknown dtype 'F12'"),
    (lambda h: h[Q_PROJ].update(shape=[48, 49]), "does not fill"),
    (lambda h: h[Q_PROJ].update(shape=[48, -48]), "shape [48, -48]"),
    (lambda h: h[Q_PROJ].update(data_offsets=[0]), "data_offsets [0]"),
    (lambda h: h[Q_PROJ].update(data_offsets=[0, 9216]), "starts at byte"),
    (lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [10**7, 10**7 + 4]}), "starts at byte"),
  ],
)
def test_corrupt_safetensors_header(source, tmp_path, change, fragment):
  path = source / "model.safetensors"
  rewrite_header(path, change)
  refuse(source, tmp_path, str(path), fragment)


def test_trailing_bytes(source, tmp_path):
  with (source / "model.safetensors").open("ab") as file:
    file.write(b"more")
  refuse(source, tmp_path, "longer than its header says")


@pytest.fixture
def sharded(source):
  tensors = load_file(source / "model.safetensors")
  (source / "model.safetensors").unlink()
  names = list(tensors)
  weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
  for i in range(2):
    save_file({name: tensors[name] for name in names[i::2]}, source / f"part-{i}.safetensors")
  write_index(source, weight_map)
  return source, weight_map


def write_index(source, weight_map):
  (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
  "outside", ["../part-0.safetensors", "/etc/part-0.safetensors", "sub/part-0.safetensors", "..", ""]
)
def test_index_points_outside(sharded, tmp_path, outside):
  source, weight_map = sharded
  write_index(source, weight_map | {Q_PROJ: outside})
  refuse(source, tmp_path, f"files outside its directory (1):\n  {outside}")


def test_index_points_to_a_missing_shard(sharded, tmp_path):
  (sharded[0] / "part-1.safetensors").unlink()
  refuse(sharded[0], tmp_path, "missing files (1):\n  part-1.safetensors")


def test_index_contradicts_its_shards(sharded, tmp_path):
  source, weight_map = sharded
  other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
  write_index(source, weight_map | {Q_PROJ: other[weight_map[Q_PROJ]], "ghost": "part-0.safetensors"})
  refuse(source, tmp_path, f"another file than the index says (1):\n  {Q_PROJ}", "ghost: not in part-0.safetensors")


def test_tensor_in_two_shards(sharded, tmp_path):
  source, weight_map = sharded
  shard = source / ("part-1.safetensors" if weight_map[Q_PROJ].startswith("part-0") else "part-0.safetensors")
  save_file(load_file(shard) | {Q_PROJ: np.zeros((48, 48), np.float32)}, shard)
  refuse(source, tmp_path, f"tensors in two files (1):\n  {Q_PROJ}")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_index_without_a_map(sharded, tmp_path, index):
  (sharded[0] / "model.safetensors.index.json").write_text(index)
  refuse(sharded[0], tmp_path, "model.safetensors.index.json")


def test_both_one_file_and_an_index(source, tmp_path):
  write_index(source, {Q_PROJ: "model.safetensors"})
  refuse(source, tmp_path, "holds both")


def test_no_weights(source, tmp_path):
  (source / "model.safetensors").rename(source / "other.safetensors")
  refuse(source, tmp_path, "it holds other.safetensors. Give one of these files")
  (source / "other.safetensors").unlink()
  refuse(source, tmp_path, "wanted model.safetensors or pytorch_model.bin")


def test_sources_that_are_none(source, tmp_path):
  refuse(tmp_path / "nowhere", tmp_path, "does not exist")
  refuse(source / "config.json", tmp_path, "wanted a directory or a .gguf, .safetensors, .bin, .pt, .pth file")
  (tmp_path / "model.safetensors").write_bytes(b"")
  refuse(tmp_path / "model.safetensors", tmp_path, "config.json: cannot be read: No such file")
  (source / "config.json").unlink()
  refuse(source, tmp_path, "holds neither config.json nor a .gguf file")


def test_output_that_holds_something(source, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "precious").write_text("kept")
  refuse(source, tmp_path, "already exists")
  assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_unknown_dtype(source, tmp_path):
  with pytest.raises(ConversionError, match="dtype='int8'"):
    convert(source, tmp_path / "out", "int8")


def with_decoder(decoder) -> bytes:
  tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
  tokenizer.decoder = decoder
  return tokenizer.to_str().encode()


@pytest.mark.parametrize(
  "name, contents, fragment",
  [
    ("tokenizer.json", b"{", "tokenizer.json: not valid JSON"),
    ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
    ("tokenizer.model", b"nothing of the kind", "tokenizer.model cannot be read"),
    ("tokenizer.model", b"", "tokenizer.model cannot be read"),
    ("tokenizer.json", with_decoder(decoders.WordPiece()), 'the decoder {"type": "WordPiece"'),
  ],
)
def test_tokenizers(source, tmp_path, name, contents, fragment):
  (source / name).write_bytes(contents)
  refuse(source, tmp_path, "the tokenizer cannot be used", fragment)


def test_a_write_that_fails_leaves_nothing(source, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError):
    convert(source, tmp_path / "file" / "out")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


@pytest.mark.parametrize("others, kind", [(["config.json", "model.safetensors"], "beside the"), ([], "and no model")])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(source, tmp_path, others, kind, name):
  """By itself it is no model; beside one transformers would load both."""
  for file in source.iterdir():
    if file.name not in others:
      file.unlink()
  (source / name).write_text("{}")
  said = refuse(source, tmp_path, f"{source}: holds a LoRA adapter ({name}) {kind}", "merge it into its")
  assert "\n" not in said
  if name.endswith(".safetensors"):
    refuse(source / name, tmp_path, f"{source / name}: holds a LoRA adapter")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth", "consolidated-00001-of-00002.pth"])
def test_the_form_of_meta_and_mistral(source, tmp_path, name):
  (source / "params.json").write_text("{}")
  (source / name).write_bytes(b"not looked at where model.safetensors is")
  assert open_source(source).weight_files == [source / "model.safetensors"]
  (source / "model.safetensors").unlink()
  for with_config in (True, False):
    for path in (source, source / name):
      said = refuse(
        path, tmp_path, f"{path}: holds the original form of Meta's and Mistral's models ({name}, params.json)"
      )
      assert "\n" not in said and "config.json and model*.safetensors" in said
    if with_config:
      (source / "config.json").unlink()


def test_a_broken_tokenizer_gives_way_to_another(source, tmp_path):
  """Which `--tokenizer` names: what is replaced is not looked at."""
  (source / "tokenizer.json").write_text("{")
  (tmp_path / "other").mkdir()
  other = Tokenizer(models.BPE({"a": 0}, []))
  other.decoder = decoders.ByteLevel()
  other.save(str(tmp_path / "other" / "tokenizer.json"))
  assert open_source(source, tmp_path / "other").tokenizer_files.keys() == {"tokenizer.json", "generation_config.json"}
  refuse(source, tmp_path, "tokenizer")
