"""Documents come out of every kind of file, in order, and what is damaged is named."""

import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from supra_jax.data import text


def read(path, text_key="text"):
  return list(text.read_documents(str(path), text_key))


def write_parquet(path, column, name="text", **options):
  parquet.write_table(pa.table({"other": range(len(column)), name: column}), path, **options)
  return path


def test_kinds_of_file_in_order(tmp_path):
  lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("één", "two\nlines", "")]
  payload = ("\n".join(lines) + "\n").encode()
  (tmp_path / "a.jsonl").write_bytes(payload)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(payload))
  compress = zstandard.ZstdCompressor().compress
  # Two frames, and a line across them.
  (tmp_path / "c.jsonl.zst").write_bytes(compress(payload[:10]) + compress(payload[10:]))
  write_parquet(tmp_path / "d.parquet", ["één", "two\nlines", ""])
  (tmp_path / "e.txt").write_text("a file\nis a document\n")
  (tmp_path / "f.md").write_text("# so\nis this\n")
  (tmp_path / "g.json").write_text(json.dumps([{"text": text} for text in ("één", "two\nlines", "")], indent=2))
  (tmp_path / "h.csv").write_text('id,text\n1,één\n\n2,"two\nlines"\n3,\n')
  wanted = ["één", "two\nlines", ""]
  files = ["a file\nis a document\n", "# so\nis this\n"]
  assert read(tmp_path / "*") == wanted * 4 + files + wanted * 2


def test_a_directory_and_a_list(tmp_path):
  """All files below a directory, but those that are hidden or describe the others, and those that hold no text."""
  (tmp_path / "deep" / ".cache").mkdir(parents=True)
  for name in ("a.txt", "deep/b.txt", "deep/c, d.txt", "README.md", "LICENSE.txt", ".e.txt", "deep/.cache/f.txt"):
    (tmp_path / name).write_text(name)
  (tmp_path / "weights.bin").write_bytes(b"x")
  assert read(tmp_path) == ["a.txt", "deep/b.txt", "deep/c, d.txt"]
  assert read(tmp_path / "README.md") == ["README.md"]
  assert read(f"{tmp_path}/a.txt, {tmp_path}/deep/b*,{tmp_path}/*.txt") == ["LICENSE.txt", "a.txt", "deep/b.txt"]
  assert read(tmp_path / "deep/c, d.txt") == ["deep/c, d.txt"]
  with pytest.raises(FileNotFoundError, match=r"No file matches '.*none\*'"):
    read(f"{tmp_path}/a.txt,{tmp_path}/none*")
  for name in ("dataset_info.json", "README-of-data.txt"):
    (tmp_path / name).write_text("{}")
  assert read(tmp_path)[0] == "{}" and len(read(tmp_path)) == 4  # the second holds data
  pydoc = read(f"{tmp_path}/a.txt,{text.PYDOC_TOPICS}")
  assert "a.txt" in pydoc and len(pydoc) == 1 + len(read(text.PYDOC_TOPICS))
  (tmp_path / "b[1].txt").write_text("by name")
  assert read(tmp_path / "b[1].txt") == ["by name"]
  for empty in ("", f"{tmp_path}/a.txt,", f" , {tmp_path}/a.txt"):
    with pytest.raises(ValueError, match=r"names no files"):
      read(empty)
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match=r"empty has no files that end in \.txt"):
    read(tmp_path / "empty")


@pytest.mark.parametrize(
  "name, contents, said",
  [
    ("a.json", '{"text": "x"}', r"a\.json: wanted an array of records.*JSON lines ends in \.jsonl"),
    ("a.json", '{"text": "x"}\n{"text": "y"}\n', r"a\.json: not JSON.*The name of JSON lines ends in \.jsonl"),
    ("a.json", '[{"text": "x"}, {"text": 1}]', r"a\.json, row 1: no text under 'text'"),
    ("a.csv", "id,body\n1,x\n", r"a\.csv: wanted one column 'text'; its columns are id, body"),
    ("a.csv", "id,text\n1,x\n2\n", r"a\.csv, row 1: null under 'text', or another number of fields"),
    ("a.csv", 'id,text\n1,"x\n', r"a\.csv: unexpected end of data; its first 2 lines were read"),
    ("a.csv", "", r"a\.csv: wanted one column 'text'; its columns are none"),
  ],
)
def test_broken_json_and_csv(name, contents, said, tmp_path):
  (tmp_path / name).write_text(contents)
  with pytest.raises(ValueError, match=said):
    read(tmp_path / name)


def test_a_long_field(tmp_path):
  (tmp_path / "a.csv").write_text("text\n" + "word " * 200_000 + "\n")
  assert [len(text) for text in read(tmp_path / "a.csv")] == [1_000_000]


def test_a_byte_order_mark_is_no_text(tmp_path):
  mark = b"\xef\xbb\xbf"
  lines = mark + b'{"text": "a"}\n' + mark + b"\n" + mark + b'{"text": "b"}\n'
  (tmp_path / "a.jsonl").write_bytes(lines)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
  (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
  (tmp_path / "d.txt").write_bytes(mark + b"of Windows")
  assert read(tmp_path / "*") == ["a", "b"] * 3 + ["of Windows"]


def test_text_key(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
  write_parquet(tmp_path / "b.parquet", ["y"], name="body")
  assert read(tmp_path / "*", "body") == ["x", "y"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("skip", [0, 1, 70, 199, 200, 300])
def test_pieces_from_anywhere(tmp_path, monkeypatch, ending, skip):
  texts = [f"document {i} " + "x" * (i % 50) for i in range(200)]
  path = tmp_path / f"a.{ending}"
  lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
  if ending == "parquet":
    write_parquet(path, texts, row_group_size=30)
  elif ending.endswith("gz"):
    path.write_bytes(gzip.compress(lines))
  else:
    path.write_bytes(zstandard.ZstdCompressor().compress(lines) if ending.endswith("zst") else lines)
  monkeypatch.setattr(text, "PIECE_BYTES", 1000)
  pieces = list(text.read_pieces(str(path), skip=skip))
  assert [t for piece in pieces for _, t in text.parse(piece)] == texts[skip:]
  at = skip + (ending != "parquet")
  for piece in pieces:
    assert piece.first == at
    at += len(piece.items)
    assert 0 < piece.bytes_read <= path.stat().st_size
  assert skip >= 200 or ((len(pieces) > 1 or skip == 199) and pieces[-1].bytes_read == path.stat().st_size)


@pytest.mark.parametrize(
  "line", ["{", "[]", '{"other": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "\x00", "[" * 100_000], ids=repr
)
def test_bad_line_is_named(tmp_path, line):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 3"):
    read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"junk" + b, lambda b: b + b"junk"])
def test_damaged_compressed_file_is_named(tmp_path, name, damage):
  compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
  noise = np.random.default_rng(0).integers(0, 10**9, 50_000)
  payload = b"".join(b'{"text": "%d"}\n' % number for number in noise)
  (tmp_path / name).write_bytes(damage(compress(payload)))
  with pytest.raises(ValueError, match=name):
    read(tmp_path / name)


def test_not_utf8(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
    read(tmp_path / "a.txt")


def test_nothing_matches(tmp_path):
  with pytest.raises(FileNotFoundError, match="No file matches"):
    read(tmp_path / "*.txt")


def test_unknown_kind(tmp_path):
  (tmp_path / "a.doc").write_text("x")
  with pytest.raises(ValueError, match=r"a\.doc: wanted a name that ends in \.txt"):
    read(tmp_path / "*")


def test_pydoc_topics():
  topics = read(text.PYDOC_TOPICS)
  assert len(topics) > 50
  assert sum(map(len, topics)) > 300_000


class TestParquet:
  @pytest.mark.compat
  @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
  @pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
  def test_round_trip(self, tmp_path, kind, codec):
    texts = [f"één {i % 7}" for i in range(500)]
    path = write_parquet(tmp_path / "a.parquet", pa.array(texts).cast(kind), compression=codec, row_group_size=99)
    assert read(path) == texts

  def test_wrong_columns(self, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], name="content")
    with pytest.raises(ValueError, match=r"a\.parquet: wanted one column 'text'; its columns are other, content"):
      read(path)
    with pytest.raises(ValueError, match=r"a\.parquet: the column 'other' holds int64, not text"):
      read(path, "other")

  def test_null_and_bytes_that_are_no_text(self, tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet, row 150: null under 'text'"):
      read(write_parquet(tmp_path / "a.parquet", ["x"] * 150 + [None]))
    torn = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"]).buffers())
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: not UTF-8"):
      read(write_parquet(tmp_path / "b.parquet", torn))

  def test_damaged(self, tmp_path):
    noise = [str(number) for number in np.random.default_rng(0).integers(0, 10**9, 10_000)]
    path = write_parquet(tmp_path / "a.parquet", noise, row_group_size=1000, write_page_checksum=True)
    whole = path.read_bytes()
    for damage in (b"", b"junk", whole[: len(whole) // 2]):
      path.write_bytes(damage)
      with pytest.raises(ValueError, match=r"a\.parquet: cannot be read from row 0 on"):
        read(path)
    path.write_bytes(whole)
    flipped = bytearray(whole)
    flipped[parquet.read_metadata(path).row_group(5).column(1).data_page_offset + 100] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read from row [1-9]\d* on"):
      read(path)

  def test_without_pyarrow(self, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'supra_jax\[parquet\]'"):
      read(path)
