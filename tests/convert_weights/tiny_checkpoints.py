"""Small checkpoints for the tests here: golden directories to mutate, and GGUF files made from them."""

import functools
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from convert_weights.open_source import open_source
from supra_jax import LM

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hf"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
HEADS, KV_HEADS, HEAD_DIM, WIDTH, FFN, VOCAB, LAYERS = 6, 2, 8, 48, 64, 97, 2


# Files of a tokenizer of one token.
TOKENIZER = {
  "tokenizer.json": json.dumps(
    {
      "version": "1.0",
      "added_tokens": [],
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
      "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
      "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
  ).encode(),
  "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
}


def copy_case(case: str, directory: Path, **config_changes) -> Path:
  """Copies a golden case; a change of None removes the key."""
  shutil.copytree(GOLDEN / case, directory)
  change_config(directory, **config_changes)
  return directory


def change_config(directory: Path, **changes) -> None:
  path = directory / "config.json"
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({key: value for key, value in config.items() if not (key in changes and value is None)}))


def source_tensors(case: str) -> dict[str, np.ndarray]:
  return load_file(GOLDEN / case / "model.safetensors")


def read(source: Path) -> LM:
  """The model of a source, its leaves read and nothing written."""
  opened = open_source(source)
  params: dict = {}
  for leaf in opened.leaves:
    node = functools.reduce(lambda node, key: node.setdefault(key, {}), leaf.path[:-1], params)
    node[leaf.path[-1]] = leaf.read()
  return LM(opened.config, params)


def leaf(params, path: str) -> np.ndarray:
  for key in path.split("/"):
    params = params[key]
  return np.asarray(params)


def flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f"{prefix}{key}/")
    else:
      yield f"{prefix}{key}", np.asarray(value)


def check_parameters(params, source, tied):
  """Every parameter against its tensor, through a mapping written independently of the converter's."""
  ours = dict(flatten(params))
  for name, tensor in source.items():
    path = name.removeprefix("model.").removesuffix(".weight").replace("layers.", "layers_", 1).replace(".", "/")
    if path.endswith("_proj") or path == "lm_head":
      path, tensor = f"{path}/kernel", tensor.T
    else:
      path += "/embedding" if path == "embed_tokens" else "/weight"
    np.testing.assert_array_equal(ours.pop(path), tensor, strict=True, err_msg=name)
  assert not ours
  assert ("lm_head" in params) == (not tied)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
  """What llama.cpp's converter does to q and k: halves (i, i + K/2) to pairs (2i, 2i+1)."""
  return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_names() -> dict[str, tuple[str, int | None]]:
  """GGUF name -> Hugging Face name and the heads to permute."""
  result = {"token_embd.weight": ("model.embed_tokens.weight", None), "output_norm.weight": ("model.norm.weight", None)}
  for i in range(LAYERS):
    for ours, theirs, heads in (
      ("attn_norm", "input_layernorm", None),
      ("ffn_norm", "post_attention_layernorm", None),
      ("attn_q", "self_attn.q_proj", HEADS),
      ("attn_k", "self_attn.k_proj", KV_HEADS),
      ("attn_v", "self_attn.v_proj", None),
      ("attn_output", "self_attn.o_proj", None),
      ("ffn_gate", "mlp.gate_proj", None),
      ("ffn_up", "mlp.up_proj", None),
      ("ffn_down", "mlp.down_proj", None),
    ):
      result[f"blk.{i}.{ours}.weight"] = (f"model.layers.{i}.{theirs}.weight", heads)
  return result


BYTE_TOKENS = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))] + [
  chr(256 + i) for i in range(68)
]


def write_gguf(
  path: Path,
  *,
  case: str = "llama_gqa_tied",
  quantisation: dict[str, gguf.GGMLQuantizationType] | None = None,
  metadata: dict | None = None,
  drop: tuple[str, ...] = (),
  extra: dict[str, np.ndarray] | None = None,
  tokens: list[str] | None = None,
  pre: str = "smollm",
  model: str = "gpt2",
) -> Path:
  """Writes a golden case as llama.cpp's converter would; `metadata` replaces llama.* keys, None drops one."""
  source = source_tensors(case)
  values = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": VOCAB,
  } | (metadata or {})
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in values.items():
    if isinstance(value, bool):
      writer.add_bool(f"llama.{key}", value)
    elif isinstance(value, int):
      writer.add_uint32(f"llama.{key}", value)
    elif isinstance(value, float):
      writer.add_float32(f"llama.{key}", value)
    elif value is not None:
      writer.add_string(f"llama.{key}", value)
  if tokens is not None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
  for name, (hf_name, heads) in gguf_names().items():
    if name in drop:
      continue
    array = source[hf_name]
    array = permute(array, heads) if heads else array
    kind = (quantisation or {}).get(name.split(".")[-2], gguf.GGMLQuantizationType.F32)
    if kind == gguf.GGMLQuantizationType.F32:
      writer.add_tensor(name, np.ascontiguousarray(array))
    else:
      writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
  for name, array in (extra or {}).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def split_gguf(path: Path, stem: Path, parts: int) -> list[Path]:
  """Writes a GGUF file again as gguf-split would: all metadata in the first part, a share of the tensors in each."""
  reader = gguf.GGUFReader(path)
  paths = [stem.with_name(f"{stem.name}-{number + 1:05}-of-{parts:05}.gguf") for number in range(parts)]
  for number, part in enumerate(paths):
    writer = gguf.GGUFWriter(part, "llama")
    for field in reader.fields.values() if number == 0 else ():
      if not field.name.startswith(("GGUF.", "general.architecture")):
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], item)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", parts)
    writer.add_int32("split.tensors.count", len(reader.tensors))
    for tensor in reader.tensors[number::parts]:
      writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  return paths
