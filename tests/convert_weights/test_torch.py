"""PyTorch's files: the same parameters as safetensors give, and no code run."""

import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
from tiny_checkpoints import copy_case, source_tensors

from convert_weights.errors import ConversionError
from convert_weights.hf_to_orbax import convert
from convert_weights.open_source import open_source
from convert_weights.torch_file import open_torch
from supra_jax.storage.model_directory import load_model

CASE = "mistral_gqa"


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


@pytest.fixture
def state(torch):
  return {name: torch.from_numpy(tensor) for name, tensor in source_tensors(CASE).items()}


@pytest.fixture
def source(tmp_path):
  directory = copy_case(CASE, tmp_path / "source")
  (directory / "model.safetensors").unlink()
  return directory


def assert_same(source, tmp_path):
  """The leaves of a source are those of the golden case."""
  wanted = {leaf.path: leaf.read() for leaf in open_source(copy_case(CASE, tmp_path / "safetensors")).leaves}
  got = {leaf.path: leaf.read() for leaf in open_source(source).leaves}
  assert got.keys() == wanted.keys()
  for path, array in wanted.items():
    np.testing.assert_array_equal(got[path], array, strict=True)


def refuse(path, fragment):
  with pytest.raises(ConversionError) as caught:
    open_torch(path)
  assert fragment in str(caught.value) and str(path) in str(caught.value), str(caught.value)
  return str(caught.value)


def test_one_file(torch, state, source, tmp_path):
  torch.save(state, source / "pytorch_model.bin")
  assert_same(source, tmp_path)
  convert(source, tmp_path / "out")
  assert load_model(tmp_path / "out").source["files"][0]["name"] == "pytorch_model.bin"


def test_safetensors_come_first(torch, state, source, tmp_path):
  copy_case(CASE, tmp_path / "other")
  (source / "pytorch_model.bin").write_bytes(b"")
  (tmp_path / "other" / "model.safetensors").rename(source / "model.safetensors")
  assert open_source(source).weight_files == [source / "model.safetensors"]


def test_shards(torch, state, source, tmp_path):
  names, weight_map = list(state), {}
  for i in range(3):
    shard = f"pytorch_model-{i + 1:05}-of-00003.bin"
    torch.save({name: state[name] for name in names[i::3]}, source / shard)
    weight_map |= dict.fromkeys(names[i::3], shard)
  (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
  assert_same(source, tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_types(torch, tmp_path, dtype):
  torch.save({"a": torch.arange(12.0).reshape(4, 3).to(getattr(torch, dtype))}, tmp_path / "a.pt")
  (stored,) = open_torch(tmp_path / "a.pt").values()
  assert (stored.type_name, stored.shape, stored.num_bytes) == (dtype, (4, 3), 12 * stored.dtype.itemsize)
  array = stored.read()
  assert array.dtype == stored.dtype == np.dtype(dtype)
  np.testing.assert_array_equal(array.astype(np.float32), np.arange(12.0).reshape(4, 3))


def test_views(torch, tmp_path):
  """Tensors that share storage, start inside it, are transposed or have gaps."""
  base = torch.arange(60.0).reshape(10, 6)
  views = {
    "base": base,
    "rows": base[3:7],
    "transposed": base.T,
    "every_second": base[::2, 1::3],
    "number": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(base[0]),
    "empty": torch.zeros(0, 3),
  }
  torch.save(views, tmp_path / "a.pt")
  stored = open_torch(tmp_path / "a.pt")
  assert stored.keys() == views.keys()
  for name, view in views.items():
    np.testing.assert_array_equal(stored[name].read(), view.detach().numpy(), strict=True, err_msg=name)
  for name in ("base", "transposed", "every_second"):
    np.testing.assert_array_equal(stored[name].read_rows(1, 4), views[name][1:4].numpy(), strict=True, err_msg=name)


class _Opens:
  """Would make a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_code_is_not_run(torch, state, tmp_path):
  torch.save(state | {"extra": _Opens(tmp_path / "run")}, tmp_path / "a.pt")
  refuse(tmp_path / "a.pt", "needs more than tensors, and could run code.\nnames (1):\n  io open")
  assert not (tmp_path / "run").exists()
  (tmp_path / "b.pt").write_bytes(pickle.dumps(_Opens(tmp_path / "run")))  # and no archive around it
  refuse(tmp_path / "b.pt", "not of the form that torch.save writes")
  assert not (tmp_path / "run").exists()


def test_torch_itself_lets_no_code_run(torch, tmp_path):
  """What our own list of names would let through: a function of torch that is not for tensors."""
  torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
  code = b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R."
  rewrite(tmp_path / "a.pt", lambda records: records.update({"a/data.pkl": code}))
  assert "weights_only=False" not in refuse(tmp_path / "a.pt", "Unsupported global: GLOBAL torch.load")


def test_what_is_no_state_dict(torch, tmp_path):
  path = tmp_path / "a.pt"
  for value, fragment in (
    ([torch.zeros(2)], "holds no state dict"),
    ({}, "holds no state dict"),
    ({"state_dict": 3}, "holds no state dict"),
    ({"a": torch.zeros(2), "b": {"c": torch.zeros(2)}}, "other entries (1):\n  b"),
    ({1: torch.zeros(2)}, "other entries (1):\n  1"),
  ):
    torch.save(value, path)
    refuse(path, fragment)
  torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
  refuse(path, "not of the form that torch.save writes since PyTorch 1.6")


def test_types_that_are_not_read(torch, tmp_path):
  torch.save({"a": torch.zeros(2, dtype=torch.int8), "b": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
  stored = open_torch(tmp_path / "a.pt")
  assert {name: (tensor.dtype, tensor.type_name) for name, tensor in stored.items()} == {
    "a": (None, "strided int8"),
    "b": (None, "sparse_coo float32"),
  }


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1, -30, -5000])
def test_truncated(torch, state, tmp_path, keep):
  torch.save(state, tmp_path / "whole.pt")
  (tmp_path / "a.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:keep])
  refuse(tmp_path / "a.pt", "truncated")


def rewrite(path, change, **options):
  """The archive once more, its records (name -> bytes) changed, and wherever the zipfile module puts them."""
  with zipfile.ZipFile(path) as archive:
    records = {info.filename: archive.read(info) for info in archive.infolist()}
  records.pop(f"{path.stem}/.format_version", None)  # which says that they are where torch puts them
  change(records)
  with zipfile.ZipFile(path, "w", **options) as archive:
    for name, data in records.items():
      archive.writestr(name, data)


def test_lies(torch, tmp_path):
  path = tmp_path / "a.pt"

  def save():
    torch.save({"a": torch.arange(6.0), "b": torch.arange(4.0)}, path)

  save()
  rewrite(path, lambda records: None)
  np.testing.assert_array_equal(open_torch(path)["b"].read(), np.arange(4.0))  # the rewriting itself is sound
  rewrite(path, lambda records: records.update({"a/data/0": bytes(20)}))
  refuse(path, "a claims a record of 24 bytes at byte")
  save()
  rewrite(path, lambda records: records.pop("a/data/1"))
  refuse(path, "torch refuses it")
  save()
  rewrite(path, lambda records: None, compression=zipfile.ZIP_DEFLATED)
  refuse(path, "is compressed")
  save()
  rewrite(path, lambda records: records.update({"a/byteorder": b"big"}))
  refuse(path, "big-endian")
  torch.save({"a": torch.zeros(1).expand(10**12)}, path)
  refuse(path, "does not lie within its 4 bytes")


def test_a_pickle_that_asks_for_memory(torch, tmp_path):
  """`bytearray(10**13)`, which torch's unpickler would call."""
  torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
  code = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R."
  rewrite(tmp_path / "a.pt", lambda records: records.update({"a/data.pkl": code}))
  refuse(tmp_path / "a.pt", "__builtin__ bytearray")


@pytest.mark.parametrize("width, depth", [(2, 60), (1000, 6)])
def test_a_pickle_that_asks_for_time(torch, tmp_path, width, depth):
  """A dict with a key that takes forever to hash: (k, k, ...), where k = (j, j, ...), and so on."""
  torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
  code = b"\x80\x02})" + b"".join(b"q%c0" % i + b"(" + width * (b"h%c" % i) + b"t" for i in range(depth)) + b"Ns."
  rewrite(tmp_path / "a.pt", lambda records: records.update({"a/data.pkl": code}))
  refuse(tmp_path / "a.pt", "repeats objects within objects; loading it would take hours")


def test_every_cut_and_many_flipped_bytes_are_handled(torch, tmp_path):
  """A damaged file ends in a ConversionError or is read: no crash, no hang."""
  path = tmp_path / "a.pt"
  torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}, path)
  raw = path.read_bytes()
  for position in range(0, len(raw), 5):
    for contents in (raw[:position], raw[:position] + bytes([raw[position] ^ 0x55]) + raw[position + 1 :]):
      path.write_bytes(contents)
      try:
        for stored in open_torch(path).values():
          if stored.dtype is not None:
            stored.read()
      except ConversionError as error:
        assert str(path) in str(error)


def test_without_torch(source, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (source / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(
    ConversionError, match=r"pytorch_model.bin: reading it needs torch: pip install 'supra_jax\[torch\]'"
  ):
    open_source(source)
