import gzip
import json
import subprocess
import sys

import grain
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import zstandard

from supra_jax import data

EOS, BOS = 1, 2


class ByteTokenizer:
  """Three special ids, then the bytes: small, real and reversible."""

  eos_ids = (EOS,)
  bos_id = BOS

  def __init__(self, shift=3):
    self.shift = shift

  def encode(self, text, *, bos=None):
    return [BOS] * bool(bos) + [byte + self.shift for byte in text.encode()]


def pack(documents, path, tokenizer=None, **options):
  options = {"vocab_size": 259, "sequence_length": 8, **options}
  return data.pack(documents, tokenizer or ByteTokenizer(), path, **options)


@pytest.fixture
def packed(tmp_path):
  pack([f"document {i}, and a little more." for i in range(20)], tmp_path / "packed")
  return tmp_path / "packed"


def take(iterator, count):
  return [next(iterator)["tokens"] for _ in range(count)]


class TestReadDocuments:
  def test_kinds_of_file_in_order(self, tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("één", "two\nlines", "")]
    payload = ("\n".join(lines) + "\n").encode()
    (tmp_path / "a.jsonl").write_bytes(payload)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(payload))
    compress = zstandard.ZstdCompressor().compress
    # Two frames, and a line across them.
    (tmp_path / "c.jsonl.zst").write_bytes(compress(payload[:10]) + compress(payload[10:]))
    (tmp_path / "d.txt").write_text("a file\nis a document\n")
    read = list(data.read_documents(str(tmp_path / "*")))
    assert read == ["één", "two\nlines", ""] * 3 + ["a file\nis a document\n"]

  def test_text_key(self, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert list(data.read_documents(str(tmp_path / "a.jsonl"), text_key="body")) == ["x"]

  @pytest.mark.parametrize("line", ["{", "[]", '{"other": "x"}', '{"text": 3}', "\x00"])
  def test_bad_line_is_named(self, tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3"):
      list(data.read_documents(str(tmp_path / "a.jsonl")))

  @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
  @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"junk" + b, lambda b: b + b"junk"])
  def test_damaged_compressed_file_is_named(self, tmp_path, name, damage):
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    noise = np.random.default_rng(0).integers(0, 10**9, 50_000)
    payload = b"".join(b'{"text": "%d"}\n' % number for number in noise)
    (tmp_path / name).write_bytes(damage(compress(payload)))
    with pytest.raises(ValueError, match=name):
      list(data.read_documents(str(tmp_path / name)))

  def test_not_utf8(self, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
      list(data.read_documents(str(tmp_path / "a.txt")))

  def test_nothing_matches(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="No file matches"):
      list(data.read_documents(str(tmp_path / "*.txt")))

  def test_unknown_kind(self, tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"a\.parquet: wanted"):
      list(data.read_documents(str(tmp_path / "*")))

  def test_pydoc_topics(self):
    topics = list(data.read_documents("pydoc:topics"))
    assert len(topics) > 50
    assert sum(map(len, topics)) > 300_000


@hypothesis.given(st.integers(0, 30), st.integers(2, 7))
def test_split_documents(count, every):
  documents = [str(i) for i in range(count)]
  train, heldout = (list(data.split_documents(documents, every=every, part=part)) for part in ("train", "heldout"))
  assert heldout == documents[every - 1 :: every]
  assert sorted(train + heldout) == sorted(documents)


def test_split_documents_refuses():
  with pytest.raises(ValueError, match="every=1"):
    list(data.split_documents(["a"], every=1, part="train"))
  with pytest.raises(ValueError, match="part='test'"):
    list(data.split_documents(["a"], every=2, part="test"))


class TestPack:
  @hypothesis.settings(max_examples=40, deadline=None)
  @hypothesis.given(
    st.lists(st.text(max_size=30), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(["join", "separate"]),
    st.booleans(),
  )
  def test_every_token_is_a_target_once(self, tmp_path_factory, documents, sequence_length, join, bos):
    path = tmp_path_factory.mktemp("pack") / "out"
    encoded = [[BOS] * bos + [b + 3 for b in text.encode()] + [EOS] for text in documents if text]
    stream = [token for ids in encoded for token in ids]
    segments = [number for number, ids in enumerate(encoded) for _ in ids]
    if len(stream) < sequence_length + 1:
      with pytest.raises(ValueError, match="too few for one row"):
        pack(documents, path, sequence_length=sequence_length, join=join, bos=bos)
      assert not path.exists()
      return
    info = pack(documents, path, sequence_length=sequence_length, join=join, bos=bos)
    dataset = data.PackedDataset(path)
    targets = [token for i in range(len(dataset)) for token in dataset[i]["tokens"][1:]]
    assert targets == stream[1 : 1 + info.tokens]
    assert info.tokens + info.dropped_tokens + 1 == len(stream)
    assert info.dropped_tokens < sequence_length
    assert (info.rows, info.documents) == (len(dataset), len(encoded))
    for i in range(len(dataset)):
      row = dataset[i]
      at = slice(i * sequence_length, (i + 1) * sequence_length + 1)
      assert row["tokens"].tolist() == stream[at]
      assert row["tokens"].dtype == np.int32
      assert ("segment_ids" in row) == (join == "separate")
      if join == "separate":
        assert row["segment_ids"].tolist() == [number - segments[at][0] + 1 for number in segments[at]]

  @pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "<u2"), (2**16, "<u2"), (2**16 + 1, "<i4")])
  def test_same_bytes_and_dtype(self, tmp_path, vocab_size, dtype):
    for name in ("a", "b"):
      info = pack(["some text"] * 9, tmp_path / name, vocab_size=vocab_size)
    assert info.dtype == dtype
    for name in (data.META_FILE, data.ROWS_FILE):
      assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

  def test_ids_above_16_bits(self, tmp_path):
    pack(["some text"] * 9, tmp_path / "a", tokenizer=ByteTokenizer(shift=100_000), vocab_size=200_000)
    assert data.PackedDataset(tmp_path / "a")[0]["tokens"][0] == 100_000 + ord("s")

  def test_refusals_leave_nothing(self, tmp_path):
    def broken():
      yield "a long enough document"
      raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
      pack(broken(), tmp_path / "a")
    with pytest.raises(ValueError, match="vocab_size is 50"):
      pack(["a long enough document"], tmp_path / "a", vocab_size=50)
    with pytest.raises(ValueError, match="sequence_length=0"):
      pack(["text"], tmp_path / "a", sequence_length=0)
    no_ids = ByteTokenizer()
    no_ids.bos_id = None
    with pytest.raises(ValueError, match="no begin-of-text"):
      pack(["text"], tmp_path / "a", tokenizer=no_ids, bos=True)
    no_ids.eos_ids = ()
    with pytest.raises(ValueError, match="no end-of-text"):
      pack(["text"], tmp_path / "a", tokenizer=no_ids)
    assert list(tmp_path.iterdir()) == []

  def test_never_overwrites(self, packed):
    with pytest.raises(FileExistsError):
      pack(["a long enough document"], packed)


class TestCheck:
  def test_fits(self, packed):
    info = data.check_packed(packed, sequence_length=8, vocab_size=300, tokenizer=ByteTokenizer(), join="join")
    assert info == data.load_info(packed)

  def test_names_all_that_differs(self, packed):
    with pytest.raises(
      ValueError, match=r"sequence_length is 8, not 9.*vocab_size is 259.*'join', not.*bos=False.*another token"
    ):
      data.check_packed(packed, sequence_length=9, vocab_size=99, tokenizer=ByteTokenizer(4), join="separate", bos=True)

  @pytest.mark.parametrize("name", [data.META_FILE, data.ROWS_FILE])
  def test_missing_file(self, packed, name):
    (packed / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
      data.PackedDataset(packed)

  @pytest.mark.parametrize(
    "change", [{"format_version": 99}, {"rows": "3"}, {"dtype": "zz"}, {"new": 1}, {"rows": 3}, {"sequence_length": 5}]
  )
  def test_wrong_meta(self, packed, change):
    meta = packed / data.META_FILE
    meta.write_text(json.dumps({**json.loads(meta.read_text()), **change}))
    with pytest.raises(ValueError, match=str(packed)):
      data.PackedDataset(packed)[0]

  @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
  def test_not_meta(self, packed, text):
    (packed / data.META_FILE).write_text(text)
    with pytest.raises(ValueError, match=data.META_FILE):
      data.load_info(packed)

  @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello" + b])
  def test_damaged_rows(self, packed, damage):
    rows = packed / data.ROWS_FILE
    rows.write_bytes(damage(rows.read_bytes()))
    with pytest.raises(ValueError, match=data.ROWS_FILE):
      data.PackedDataset(packed)

  def test_flipped_bit_reaches_the_loop_with_its_file(self, packed):
    rows = packed / data.ROWS_FILE
    damaged = bytearray(rows.read_bytes())
    damaged[200] ^= 0xFF
    rows.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=rf"{data.ROWS_FILE}: row \d+ cannot be read"):
      list(data.make_loader(packed, batch_size=2, seed=0, num_epochs=1))


class TestLoader:
  def test_batches(self, packed):
    rows = data.load_info(packed).rows
    batches = list(data.make_loader(packed, batch_size=4, seed=0, shuffle=False, num_epochs=1))
    assert len(batches) == rows // 4
    dataset = data.PackedDataset(packed)
    expected = np.stack([dataset[i]["tokens"] for i in range(rows // 4 * 4)])
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches]), expected)
    assert batches[0]["tokens"].shape == (4, 9)
    assert batches[0]["tokens"].dtype == np.int32

  def test_segment_ids(self, tmp_path):
    pack(["ab", "cde"] * 8, tmp_path / "a", join="separate")
    batch = next(iter(data.make_loader(tmp_path / "a", batch_size=2, seed=0)))
    assert batch["segment_ids"].shape == batch["tokens"].shape == (2, 9)
    assert batch["segment_ids"].dtype == np.int32

  def test_each_epoch_has_every_row_in_another_order(self, packed):
    rows = data.load_info(packed).rows
    seen = np.concatenate(take(iter(data.make_loader(packed, batch_size=1, seed=3)), 2 * rows))
    first, second = seen[:rows].tolist(), seen[rows:].tolist()
    assert first != second
    assert sorted(first) == sorted(second)
    again = np.concatenate(take(iter(data.make_loader(packed, batch_size=1, seed=3)), rows))
    other = np.concatenate(take(iter(data.make_loader(packed, batch_size=1, seed=4)), rows))
    assert again.tolist() == first != other.tolist()

  @pytest.mark.parametrize("num_epochs", [None, 2])
  @pytest.mark.parametrize("count", [2, 4])
  def test_shards_make_up_the_global_batch(self, packed, count, num_epochs):
    options = {"batch_size": 8, "seed": 5, "num_epochs": num_epochs}
    rows = data.load_info(packed).rows
    steps = 2 * rows // 8
    whole = take(iter(data.make_loader(packed, **options)), steps)
    shards = [iter(data.make_loader(packed, **options, shard_index=i, shard_count=count)) for i in range(count)]
    parts = [take(shard, steps) for shard in shards]
    for step in range(steps):
      together = np.concatenate([part[step] for part in parts])
      assert sorted(together.tolist()) == sorted(whole[step].tolist())
    if num_epochs is not None:
      assert [next(shard, None) for shard in shards] == [None] * count

  def test_resumes_through_orbax(self, packed, tmp_path):
    iterator = iter(data.make_loader(packed, batch_size=4, seed=7))
    before = take(iterator, 5)
    state = {"step": jnp.asarray(5)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
      args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator))
      manager.save(5, args=args)
      manager.wait_until_finished()
    expected = take(iterator, 40)

    resumed = iter(data.make_loader(packed, batch_size=4, seed=7))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
      restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(resumed)
        ),
      )
    assert int(restored["state"]["step"]) == 5
    np.testing.assert_array_equal(take(resumed, 40), expected)
    resumed.set_state(iter(data.make_loader(packed, batch_size=4, seed=7)).get_state())
    np.testing.assert_array_equal(take(resumed, 5), before)

  def test_refusals(self, packed):
    with pytest.raises(ValueError, match="fewer than one batch of 10000"):
      data.make_loader(packed, batch_size=10_000, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
      data.make_loader(packed, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="cannot be cut for shard 0 of 3"):
      data.make_loader(packed, batch_size=4, seed=0, shard_count=3)
    with pytest.raises(ValueError, match="Seed must be"):
      data.make_loader(packed, batch_size=4, seed=-1)


def test_works_where_absl_has_parsed_no_flags(packed):
  """Grain and absl each define flags; a plain interpreter, with arguments absl does not know, must not mind."""
  code = (
    "import sys; from absl import flags; from supra_jax import data;"
    "assert not flags.FLAGS.is_parsed();"
    "print(next(iter(data.make_loader(sys.argv[1], batch_size=4, seed=0)))['tokens'].shape)"
  )
  ran = subprocess.run([sys.executable, "-c", code, packed, "--unknown"], capture_output=True, text=True, check=False)
  assert ran.stdout == "(4, 9)\n", ran.stderr
