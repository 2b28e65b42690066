"""Thousands of damaged sources: each is converted right, or refused with a ConversionError.

    python -m tests.convert_weights.fuzz --kind safetensors [...] [--examples=1000]

Hypothesis draws what is done to the files of a small source: bits, bytes, lengths, keys and values. The process has
little memory to spare and each conversion little time, so that endless loops and absurd allocations are errors too.
What is converted is held against what the format's own package reads from the same damaged files.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import faulthandler
import json
import resource
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from convert_weights.errors import ConversionError
from convert_weights.hf_to_orbax import convert
from supra_jax.model.config import ModelConfig
from supra_jax.storage.model_directory import ModelCheckpoint, load_model
from tests.convert_weights import openlm_reference as reference
from tests.convert_weights import tiny_checkpoints as tiny
from tests.support import openlm

SECONDS, MEBIBYTES = 20, 1024
CASE = "llama_gqa_tied"
TOKENS = ["<|start|>", "<|end|>", "ab", "abc", "Ġ", "Ġa", *tiny.BYTE_TOKENS[:91]]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of source.

  Attributes:
    write: writes a small one into a new directory.
    read: its tensors under the names of its format, as a package that is not ours reads them; it may use the config.
    compare: raises where a converted model has not the tensors that were read.
  """

  write: Callable[[Path], Any]
  read: Callable[[Path, ModelConfig], dict[str, np.ndarray]]
  compare: Callable[[ModelCheckpoint, dict[str, np.ndarray]], None]


def _write_directory(directory: Path) -> dict[str, np.ndarray]:
  """All but the weights, which are returned."""
  tiny.copy_case(CASE, directory)
  for name in ("golden.npz", "config_legacy.json", "model.safetensors"):
    (directory / name).unlink()
  tokenizer = Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b"), ("ab", "c")])
  )
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  tokenizer.add_special_tokens(TOKENS[:2])
  tokenizer.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": TOKENS[0], "add_bos_token": True}))
  types = (np.float32, np.float16, ml_dtypes.bfloat16)
  return {name: x.astype(types[i % 3]) for i, (name, x) in enumerate(tiny.source_tensors(CASE).items())}


def _write_safetensors(directory: Path) -> None:
  save_file(_write_directory(directory), directory / "model.safetensors", metadata={"format": "pt"})


def _write_shards(directory: Path) -> None:
  tensors = _write_directory(directory)
  parts = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
  for i, part in enumerate(parts):
    save_file(dict(list(tensors.items())[i::2]), directory / part)
  weight_map = {name: parts[i % 2] for i, name in enumerate(tensors)}
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _read_safetensors(directory: Path, config: ModelConfig) -> dict[str, np.ndarray]:
  return {name: x for path in sorted(directory.glob("*.safetensors")) for name, x in load_file(path).items()}


def _write_gguf(directory: Path) -> None:
  directory.mkdir()
  quantisation = {"ffn_down": gguf.GGMLQuantizationType.Q8_0, "attn_v": gguf.GGMLQuantizationType.BF16}
  tiny.write_gguf(directory / "model.gguf", tokens=TOKENS, quantisation=quantisation)


def _read_gguf(directory: Path, config: ModelConfig) -> dict[str, np.ndarray]:
  (path,) = directory.glob("*.gguf")
  read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
  tensors = {}
  for name, (hf_name, heads) in tiny.gguf_names().items():
    tensor = read[name]
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    if heads:
      heads = config.num_heads if "attn_q" in name else config.num_kv_heads
      array = array[np.argsort(tiny.permute(np.arange(len(array)), heads))]
    tensors[hf_name] = array
  return tensors


def _write_torch(directory: Path) -> None:
  _save_torch(_write_directory(directory), directory / "pytorch_model.bin")


def _write_openlm(directory: Path) -> None:
  directory.mkdir()
  config = json.loads((openlm.GOLDEN / "gqa_8_2" / "config.json").read_text()) | {"n_layers": 1}
  (directory / "config.json").write_text(json.dumps(config))
  _save_torch(reference.random_tensors(config), directory / "epoch_1.pt", prefix="module.")


def _save_torch(tensors: dict[str, np.ndarray], path: Path, prefix: str = "") -> None:
  import torch

  types = (torch.float32, torch.float16, torch.bfloat16)
  state = {
    prefix + name: torch.from_numpy(x.astype(np.float32)).to(types[i % 3])
    for i, (name, x) in enumerate(tensors.items())
  }
  training = {"epoch": 1, "state_dict": state, "optimizer": {"betas": (0.9, 0.95), "state": [1, None, True]}}
  torch.save(training if prefix else state, path)


def _read_torch(directory: Path, config: ModelConfig) -> dict[str, np.ndarray]:
  import torch

  (path,) = (path for path in directory.iterdir() if path.suffix in (".bin", ".pt"))
  loaded = torch.load(path, weights_only=True)
  state = loaded.get("state_dict", loaded)
  return {name.removeprefix("module."): tensor.double().numpy() for name, tensor in state.items()}


def _compare_huggingface(model: ModelCheckpoint, wanted: dict[str, np.ndarray]) -> None:
  if model.config.tie_embeddings:
    wanted.pop("lm_head.weight", None)
  tiny.check_parameters(model.params, wanted, model.config.tie_embeddings)


def _compare_openlm(model: ModelCheckpoint, wanted: dict[str, np.ndarray]) -> None:
  # Of tied embeddings either name will do.
  tied = {"output.weight", "tok_embeddings.weight"} if model.config.tie_embeddings else set()
  found = openlm.to_reference(jax.tree.map(np.asarray, model.params), model.config)
  wanted = {name.removeprefix("model."): x for name, x in wanted.items() if not name.endswith("inv_freq")}
  assert found.keys() - tied == wanted.keys() - tied
  for name, x in wanted.items():
    np.testing.assert_array_equal(found[name if name in found else "tok_embeddings.weight"], x, err_msg=name)


KINDS = {
  "safetensors": Kind(_write_safetensors, _read_safetensors, _compare_huggingface),
  "shards": Kind(_write_shards, _read_safetensors, _compare_huggingface),
  "torch": Kind(_write_torch, _read_torch, _compare_huggingface),
  "openlm": Kind(_write_openlm, _read_torch, _compare_openlm),
  "gguf": Kind(_write_gguf, _read_gguf, _compare_huggingface),
}
NEED_TORCH = ("torch", "openlm")

_INTEGERS = st.sampled_from([0, 1, 2, 7, 97, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
_VALUES = st.one_of(
  st.sampled_from([None, True, False, "", "0", "..", "llama", "F32", "a/b", "x" * 5000, [], {}, [[]], {"a": 1}]),
  st.sampled_from([-1, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 10**400]),
  _INTEGERS,
  st.text(max_size=8),
)


def damage_bytes(draw, raw: bytes) -> bytes:
  """Bits flipped, lengths overwritten, pieces cut out, repeated or put in; more often near the start."""
  where = draw(st.integers(0, min(len(raw), draw(st.sampled_from([64, 4096, len(raw)])))))
  size = draw(st.sampled_from([1, 4, 8, 100]))
  operation = draw(st.sampled_from(["flip", "number", "cut", "drop", "repeat", "insert"]))
  before, piece, after = raw[:where], raw[where : where + size], raw[where + size :]
  if operation == "flip":
    return before + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in piece[:1]) + piece[1:] + after
  if operation == "number":
    return before + draw(_INTEGERS).to_bytes(8, "little")[:size] + after
  if operation == "cut":
    return before
  return (
    before + {"drop": b"", "repeat": 2 * piece, "insert": draw(st.binary(max_size=size)) + piece}[operation] + after
  )


def damage_json(draw, value: Any) -> Any:
  """A value of the tree replaced, removed, renamed or copied elsewhere."""
  value = copy.deepcopy(value)
  places = _places(value)
  if not places:
    return draw(_VALUES)
  parent, key = draw(st.sampled_from(places))
  operation = draw(st.sampled_from(["replace", "replace", "near", "remove", "rename", "copy"]))
  if operation == "replace":
    parent[key] = draw(_VALUES)
  elif operation == "near":
    number = isinstance(parent[key], int | float)
    parent[key] = parent[key] + draw(st.integers(-2, 2)) if number else [parent[key]]
  elif operation == "remove":
    del parent[key]
  else:
    other, place = draw(st.sampled_from(places))
    if operation == "rename" and isinstance(parent, dict):
      parent[draw(st.text(max_size=8)) if draw(st.booleans()) else str(place)] = parent.pop(key)
    else:
      other[place] = copy.deepcopy(parent[key])
  return value


def _places(value: Any) -> list[tuple[Any, Any]]:
  """(parent, key) of every value below."""
  items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
  return [place for key, child in items for place in ((value, key), *_places(child))]


def damage(draw, path: Path) -> None:
  raw = path.read_bytes()
  if draw(st.integers(0, 2)) == 0:
    path.write_bytes(damage_bytes(draw, raw))
  elif path.suffix in (".bin", ".pt") and zipfile.is_zipfile(path):
    _damage_archive(draw, path)
  else:
    header = int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else 0
    try:
      tree = json.loads(raw[8 : 8 + header] if header else raw)
    except ValueError:
      path.write_bytes(damage_bytes(draw, raw))
      return
    text = json.dumps(damage_json(draw, tree)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + header :] if header else text)


def _damage_archive(draw, path: Path) -> None:
  """A record damaged in an archive that is whole; the pickle, as likely as not."""
  try:
    with zipfile.ZipFile(path) as archive:
      records = {info.filename: archive.read(info) for info in archive.infolist()}
  except Exception:  # damaged before, and zipfile has no one error for that
    return
  names = sorted(records)
  pickles = [name for name in names if name.endswith(".pkl")]
  name = draw(st.sampled_from(pickles if pickles and draw(st.booleans()) else names))
  records[name] = damage_bytes(draw, records[name])
  if draw(st.booleans()):  # or torch takes the records to be where it would put them
    records = {name: data for name, data in records.items() if not name.endswith(".format_version")}
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in records.items():
      archive.writestr(name, data)


def check(kind: Kind, source: Path, output: Path) -> bool:
  """Converts a source; whether it could be."""
  try:
    convert(source, output)
  except ConversionError as error:
    assert str(error).strip() and len(str(error)) < 20_000
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.name)], "something is left"
    return False
  model = load_model(output)
  read = kind.read(source, model.config)
  kind.compare(model, {name: x.astype(np.float32).astype(model.source["dtype"]) for name, x in read.items()})
  return True


def fuzz(name: str, examples: int, workdir: Path) -> str:
  """Damages sources of a kind so many times; what came of it. Raises what a conversion should not have raised."""
  kind, whole, source, output = KINDS[name], workdir / "whole", workdir / "source", workdir / "output"
  kind.write(whole)
  files = sorted(path.name for path in whole.iterdir())
  assert check(kind, whole, output)
  # What was allocated to get here is no one's fault.
  _limit_memory()
  counts, longest = {True: 0, False: 0}, 0.0

  @hypothesis.settings(
    max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=hypothesis.HealthCheck
  )
  @hypothesis.given(st.data())
  def run(data: st.DataObject) -> None:
    nonlocal longest
    for directory in (source, output):
      shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(whole, source)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 4]))):
      damage(data.draw, source / data.draw(st.sampled_from(files)))
    began = time.monotonic()
    signal.alarm(SECONDS)
    counts[check(kind, source, output)] += 1
    signal.alarm(0)
    longest = max(longest, time.monotonic() - began)

  run()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
  return f"{name}: {counts[True]} converted, {counts[False]} refused; longest {longest:.1f} s; peak {peak} MiB"


def _limit_memory() -> None:
  pages = int(Path("/proc/self/statm").read_text().split()[0])
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEBIBYTES * 2**20, resource.RLIM_INFINITY))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kind", choices=KINDS, nargs="+", required=True)
  parser.add_argument("--examples", type=int, default=1000)
  given = parser.parse_args()
  faulthandler.enable()
  signal.signal(signal.SIGALRM, _too_long)
  for kind in given.kind:
    with tempfile.TemporaryDirectory() as workdir:
      print(fuzz(kind, given.examples, Path(workdir)), flush=True)


def _too_long(*_: Any) -> None:
  raise TimeoutError(f"A conversion took more than {SECONDS} seconds.")


if __name__ == "__main__":
  main()
