"""A packed directory is what its meta.json says, or an error says what is wrong."""

from __future__ import annotations

import json

import pytest

from supra_jax.data import loading, packed
from tests.data.test_packing import ByteTokenizer, prepare, write_lines


@pytest.fixture
def directory(tmp_path):
  prepare(write_lines(tmp_path / "a.jsonl", ["some text"] * 100), tmp_path / "out", shard_bytes=1000)
  return tmp_path / "out/train"


def test_fits(directory):
  info = packed.check_packed(directory, sequence_length=8, vocab_size=300, tokenizer=ByteTokenizer(), documents="join")
  assert info == packed.load_info(directory)


def test_names_all_that_differs(directory):
  with pytest.raises(
    ValueError, match=r"sequence_length is 8, not 9.*vocab_size is 259.*documents='join', not.*bos=False.*another token"
  ):
    packed.check_packed(
      directory, sequence_length=9, vocab_size=99, tokenizer=ByteTokenizer(4), documents="separate", bos=True
    )


@pytest.mark.parametrize("name", [packed.META_FILE, "rows-00001.array_record"])
def test_missing_file(directory, name):
  (directory / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    loading.PackedDataset(directory)


@pytest.mark.parametrize(
  "change",
  [
    {"format_version": 99},
    {"rows": "3"},
    {"dtype": "zz"},
    {"new": 1},
    {"rows": 3},
    {"sequence_length": 5},
    {"shards": []},
    {"shards": [{"file": "rows-00000.array_record"}]},
    {"join": "apart"},
  ],
  ids=str,
)
def test_wrong_meta(directory, change):
  meta = directory / packed.META_FILE
  meta.write_text(json.dumps({**json.loads(meta.read_text()), **change}))
  with pytest.raises(ValueError, match=str(directory)):
    packed.load_info(directory)


@pytest.mark.parametrize("text_of_meta", ["", "{", "[]", "{}", "3"])
def test_not_meta(directory, text_of_meta):
  (directory / packed.META_FILE).write_text(text_of_meta)
  with pytest.raises(ValueError, match=packed.META_FILE):
    packed.load_info(directory)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" + b])
def test_damaged_file_is_named(directory, damage):
  file = directory / "rows-00001.array_record"
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(ValueError, match=r"rows-00001.array_record has \d+ bytes; meta.json says \d+"):
    loading.PackedDataset(directory)


def test_verify_names_a_flipped_bit(directory):
  file = directory / "rows-00001.array_record"
  damaged = bytearray(file.read_bytes())
  damaged[200] ^= 0xFF
  file.write_bytes(damaged)
  with pytest.raises(ValueError, match=r"rows-00001.array_record: not the bytes"):
    packed.verify(directory)
