"""What comes out of the loader is what was packed: each row as often as it should, on any number of processes."""

from __future__ import annotations

import collections
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from supra_jax.data import loading, packed, rows_writer


def write_packed(directory, first, rows, *, documents="join", dtype="<u2", shards=1, length=4, **changes):
  """A packed directory, whose row i is the token first + i, length + 1 times."""
  directory.mkdir(parents=True)
  shard_bytes = -(-rows // shards) * 2 * (length + 1)
  writer = rows_writer.RowsWriter(
    directory, sequence_length=length, documents=documents, masked=False, dtype=dtype, shard_bytes=shard_bytes
  )
  # One token more than the rows overlap by; documents of two tokens.
  ids = np.repeat(np.arange(first, first + rows), length)
  ids = np.append(ids, 0).astype(dtype)
  writer.add(ids, np.ones(len(ids), bool), np.array([*[2] * (rows * length // 2), 1]))
  info = writer.finish(bos=False, vocab_size=60_000, tokenizer_sha256="x")
  if changes:
    values = dataclasses.asdict(dataclasses.replace(info, **changes))
    (directory / packed.META_FILE).write_text(json.dumps(values))
  return str(directory)


@pytest.fixture
def a(tmp_path):
  return write_packed(tmp_path / "a", 1000, 30, shards=4)


@pytest.fixture
def b(tmp_path):
  return write_packed(tmp_path / "b", 2000, 12)


def take(loader, count):
  """[count, rows]: the first token of each row, which says which row it is."""
  return np.stack([next(loader)["tokens"][:, 0] for _ in range(count)])


class TestPackedDataset:
  def test_rows_of_all_files(self, a):
    dataset = loading.PackedDataset(a)
    assert len(dataset.info.shards) > 3
    assert [dataset[i]["tokens"][0] for i in range(len(dataset))] == list(range(1000, 1030))
    assert dataset[3]["tokens"].tolist() == [1003, 1003, 1003, 1003, 1004]
    assert dataset[3]["tokens"].dtype == np.int32

  def test_flipped_bit_reaches_the_loop_with_its_file_and_row(self, a):
    file = loading.PackedDataset(a)._files[1]
    with open(file, "r+b") as opened:
      damaged = bytearray(opened.read())
      damaged[200] ^= 0xFF
      opened.seek(0)
      opened.write(damaged)
    loader = loading.make_loader([(a, 1)], batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"rows-00001.array_record: row \d+ of the directory cannot be read") as error:
      take(loader, 30)
    row = int(str(error.value).split("row ")[1].split()[0])
    rows = loading.PackedDataset(a)
    assert file == rows._files[next(i for i, end in enumerate(rows._ends) if row < end)]

  def test_meta_that_disagrees_with_the_files(self, a):
    info = packed.load_info(a)
    shards = tuple(dataclasses.replace(shard, rows=shard.rows + 1) for shard in info.shards)
    rows = info.rows + len(shards)
    changed = dataclasses.replace(info, shards=shards, rows=rows, tokens=rows * 4)
    (Path(a) / packed.META_FILE).write_text(json.dumps(dataclasses.asdict(changed)))
    with pytest.raises(ValueError, match=r"its files hold 30 rows; meta.json says"):
      loading.PackedDataset(a)


class TestParseSources:
  @pytest.mark.parametrize(
    ("text", "sources"),
    [
      ("data/a", [("data/a", 1.0)]),
      ("data/a:0.7,data/b/train:0.3", [("data/a", 0.7), ("data/b/train", 0.3)]),
      ("data/a:2, b", [("data/a", 2.0), ("b", 1.0)]),
      ("gs://bucket/a", [("gs://bucket/a", 1.0)]),
      ("gs://bucket/a:1e-3", [("gs://bucket/a", 0.001)]),
      ("run-12:30:05/train", [("run-12:30:05/train", 1.0)]),
      ("run:5:1", [("run:5", 1.0)]),
    ],
  )
  def test_reads(self, text, sources):
    assert loading.parse_sources(text) == tuple(sources)

  @pytest.mark.parametrize("text", ["", "a,", "a,,b", ":1", "a:"])
  def test_refuses(self, text):
    with pytest.raises(ValueError, match="wanted PATH:WEIGHT"):
      loading.parse_sources(text)


class TestLoader:
  @pytest.mark.compat
  def test_batches(self, a, tmp_path):
    batch = next(loading.make_loader([(a, 1)], batch_size=4, seed=0))
    assert batch.keys() == {"tokens"}
    assert (batch["tokens"].shape, batch["tokens"].dtype) == ((4, 5), np.int32)
    path = write_packed(tmp_path / "c", 1000, 10, documents="separate")
    batch = next(loading.make_loader([(path, 1)], batch_size=4, seed=0))
    assert (batch["segment_ids"].shape, batch["segment_ids"].dtype) == ((4, 5), np.int32)
    assert batch["segment_ids"][0].tolist() == [1, 1, 2, 2, 3]

  @pytest.mark.parametrize("prefetch", [0, 3])
  def test_each_epoch_has_every_row_in_another_order(self, a, prefetch):
    seen = take(loading.make_loader([(a, 1)], batch_size=10, seed=3, prefetch=prefetch), 9).reshape(3, 30)
    for epoch in seen:
      assert sorted(epoch) == list(range(1000, 1030))
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert abs(np.corrcoef(seen[0], np.arange(30))[0, 1]) < 0.5
    again = take(loading.make_loader([(a, 1)], batch_size=10, seed=3), 9).reshape(3, 30)
    other = take(loading.make_loader([(a, 1)], batch_size=10, seed=4), 9).reshape(3, 30)
    assert again.tolist() == seen.tolist() != other.tolist()

  def test_sources_are_mixed_by_weight(self, a, b, tmp_path):
    wide = write_packed(tmp_path / "wide", 3000, 12, dtype="<i4")
    seen = take(loading.make_loader([(a, 5), (b, 3), (wide, 2)], batch_size=10, seed=0), 60)
    for batch in seen:
      assert collections.Counter(batch // 1000) == {1: 5, 2: 3, 3: 2}
    # Each source goes round and round by itself.
    for thousand, rows in ((1, 30), (2, 12), (3, 12)):
      own = seen[seen // 1000 == thousand]
      for start in range(0, len(own) - rows, rows):
        assert sorted(own[start : start + rows]) == list(range(thousand * 1000, thousand * 1000 + rows))
    # Of one length, yet not in one order.
    first_b, first_wide = seen[seen // 1000 == 2][:12] % 1000, seen[seen // 1000 == 3][:12] % 1000
    assert first_b.tolist() != first_wide.tolist()

  @pytest.mark.parametrize("count", [2, 4])
  def test_shards_make_up_the_global_batch(self, a, b, count):
    sources, options = [(a, 2), (b, 1)], {"batch_size": 8, "seed": 5}
    whole = take(loading.make_loader(sources, **options), 20)
    shards = [loading.make_loader(sources, **options, shard_index=i, shard_count=count) for i in range(count)]
    parts = [take(shard, 20) for shard in shards]
    assert len({json.dumps(shard.get_state()) for shard in shards}) == 1
    np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(20, 8), whole)

  @pytest.mark.compat
  @pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
  def test_resumes_on_another_number_of_shards(self, a, b, before, after):
    sources, options = [(a, 2), (b, 1)], {"batch_size": 8, "seed": 5}
    whole = take(loading.make_loader(sources, **options), 25)

    def make(count):
      return [loading.make_loader(sources, **options, shard_index=i, shard_count=count) for i in range(count)]

    def run(shards, steps):
      return np.stack([take(shard, steps) for shard in shards], axis=2).reshape(steps, 8)

    first = make(before)
    np.testing.assert_array_equal(run(first, 7), whole[:7])
    state = json.loads(json.dumps(first[0].get_state()))
    second = make(after)
    for shard in second:
      take(shard, 2)
      shard.set_state(state)
    np.testing.assert_array_equal(run(second, 18), whole[7:])
    # Back again, in a loader that was further on.
    second[0].set_state({"global_next_index": 0})
    np.testing.assert_array_equal(take(second[0], 3), whole[:3, ::after])

  @pytest.mark.parametrize("step", [0, 1, 17])
  def test_rows_of_a_batch_by_name(self, a, b, step):
    sources, options = [(a, 0.7), (b, 0.3)], {"batch_size": 6, "seed": 11}
    batch = take(loading.make_loader(sources, **options), step + 1)[step]
    names = loading.rows_of_batch(sources, **options, step=step)
    assert names == [f"{a if token < 2000 else b}, row {token % 1000}" for token in batch]

  def test_refusals(self, a, b, tmp_path):
    make = loading.make_loader
    with pytest.raises(ValueError, match="42 rows are fewer than one batch of 43"):
      make([(a, 1), (b, 1)], batch_size=43, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
      make([(a, 1)], batch_size=0, seed=0)
    with pytest.raises(ValueError, match="cannot be cut for shard 0 of 3"):
      make([(a, 1)], batch_size=4, seed=0, shard_count=3)
    for seed in (-1, 2**32):
      with pytest.raises(ValueError, match=f"seed={seed}"):
        make([(a, 1)], batch_size=4, seed=seed)
    for weight in (0, -1, float("nan"), float("inf")):
      with pytest.raises(ValueError, match="weights above 0"):
        make([(a, 1), (b, weight)], batch_size=4, seed=0)
    with pytest.raises(ValueError, match="at least one"):
      make([], batch_size=4, seed=0)
    with pytest.raises(FileNotFoundError, match="nowhere is no packed dataset"):
      make([(str(tmp_path / "nowhere"), 1)], batch_size=4, seed=0)

  def test_sources_that_differ_are_refused(self, a, tmp_path):
    for number, changes in enumerate(
      [{"length": 8}, {"documents": "separate"}, {"bos": True}, {"vocab_size": 9}, {"tokenizer_sha256": "y"}]
    ):
      other = write_packed(tmp_path / f"other{number}", 0, 12, **changes)
      name = next(iter(changes)).replace("length", "sequence_length")
      with pytest.raises(ValueError, match=rf"do not fit each other: {name} is .* in {a} and .* in {other}\.( Pack|$)"):
        loading.make_loader([(a, 1), (other, 1)], batch_size=4, seed=0)


class TestHeldout:
  @pytest.mark.parametrize(("max_rows", "rows"), [(0, 12), (5, 5), (8, 8), (100, 12)])
  @pytest.mark.parametrize("count", [1, 2, 4])
  def test_rows_in_order_and_padded(self, b, max_rows, rows, count):
    shards = [
      list(loading.heldout_batches(b, batch_size=8, max_rows=max_rows, shard_index=i, shard_count=count))
      for i in range(count)
    ]
    whole = [
      {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
      for batches in zip(*shards, strict=True)
    ]
    assert [batch["tokens"].shape for batch in whole] == [(8, 5)] * -(-rows // 8)
    weights = np.concatenate([batch["row_weights"] for batch in whole])
    assert weights.dtype == np.float32
    assert weights.tolist() == [1.0] * rows + [0.0] * (len(weights) - rows)
    tokens = np.concatenate([batch["tokens"][:, 0] for batch in whole])
    assert tokens.tolist() == [2000 + min(i, rows - 1) for i in range(len(weights))]

  def test_segment_ids(self, tmp_path):
    path = write_packed(tmp_path / "c", 1000, 10, documents="separate")
    batches = list(loading.heldout_batches(path, batch_size=4))
    assert all(batch["segment_ids"].shape == (4, 5) for batch in batches)

  def test_refuses(self, b):
    with pytest.raises(ValueError, match="cannot be cut for shard 0 of 3"):
      next(loading.heldout_batches(b, batch_size=4, shard_count=3))


@pytest.mark.compat
def test_works_where_absl_has_parsed_no_flags(a):
  """Grain and absl each define flags; a plain interpreter, with arguments absl does not know, must not mind."""
  code = (
    "import sys; from absl import flags; from supra_jax.data import loading;"
    "assert not flags.FLAGS.is_parsed();"
    "print(next(loading.make_loader([(sys.argv[1], 1)], batch_size=4, seed=0))['tokens'].shape)"
  )
  ran = subprocess.run([sys.executable, "-c", code, a, "--unknown"], capture_output=True, text=True, check=False)
  assert ran.stdout == "(4, 5)\n", ran.stderr
