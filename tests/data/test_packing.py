"""Packing gives every token once, the same bytes however it is cut up, and never loses or invents any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from supra_jax.core.files import locked
from supra_jax.data import encoding, loading, packed, packing, packing_job, rows_writer
from tests.support import programs

ROOT = Path(__file__).parents[2]
EOS, BOS = 1, 2
# Of many small files of rows; KILLED has the same.
OPTIONS = {"heldout_every": 10, "shard_bytes": 5000, "documents": "separate"}


class ByteTokenizer:
  """Three special ids, then the bytes: small, real and reversible."""

  eos_ids: tuple[int, ...] = (EOS,)
  bos_id: int | None = BOS

  def __init__(self, shift=3):
    self.shift = shift

  def encode(self, text, *, bos=None):
    return [BOS] * bool(bos) + [byte + self.shift for byte in text.encode()]


def write_lines(path, documents):
  path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
  return str(path)


def prepare(input, output, tokenizer=None, **options):
  options = {"vocab_size": 259, "sequence_length": 8, "workers": 0, **options}
  return packing.prepare(str(input), tokenizer or ByteTokenizer(), output, **options)


def contents(directory):
  return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def rows(directory, name="tokens"):
  dataset = loading.PackedDataset(directory)
  return np.stack([dataset[i][name] for i in range(len(dataset))])


@pytest.fixture
def text(tmp_path):
  """Three files of one hundred documents each, one of 20,000 bytes, some empty."""
  (tmp_path / "text").mkdir()
  for number in range(3):
    documents = [f"{number}.{i} " + "abc" * (i % 40) * (i % 7 > 0) for i in range(100)]
    documents[10] = documents[11] = ""
    documents[50 + number] *= 200
    write_lines(tmp_path / "text" / f"{number}.jsonl", documents)
  return tmp_path / "text" / "*.jsonl"


@pytest.fixture
def small_pieces(monkeypatch):
  monkeypatch.setattr("supra_jax.data.text.PIECE_BYTES", 500)


class TestRows:
  @hypothesis.settings(max_examples=25, deadline=None)
  @hypothesis.given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(["join", "separate"]),
    st.booleans(),
    st.integers(1, 300),
  )
  def test_every_token_is_a_target_once(self, tmp_path_factory, documents, sequence_length, join, bos, shard_bytes):
    path = tmp_path_factory.mktemp("pack") / "out"
    encoded = [[BOS] * bos + [b + 3 for b in text.encode()] + [EOS] for text in documents if text]
    stream = [token for ids in encoded for token in ids]
    segments = [number for number, ids in enumerate(encoded) for _ in ids]
    input = write_lines(path.with_name("a.jsonl"), documents)
    options = {"sequence_length": sequence_length, "documents": join, "bos": bos, "shard_bytes": shard_bytes}
    if len(stream) < sequence_length + 1:
      with pytest.raises(ValueError, match="too few for one row"):
        prepare(input, path, **options)
      assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
      return
    info = prepare(input, path, **options).train
    dataset = loading.PackedDataset(path / "train")
    assert info == dataset.info == packed.verify(path / "train")
    targets = [token for i in range(len(dataset)) for token in dataset[i]["tokens"][1:]]
    assert targets == stream[1 : 1 + info.tokens]
    assert info.tokens + info.dropped_tokens + 1 == len(stream)
    assert info.dropped_tokens < sequence_length
    assert (info.rows, info.documents) == (len(dataset), len(encoded))
    sizes = [shard.rows for shard in info.shards]
    assert sizes[:-1] == [max(1, shard_bytes // (sequence_length + 1) // (2 + 2 * (join == "separate")))] * (
      len(sizes) - 1
    )
    for i in range(len(dataset)):
      row = dataset[i]
      at = slice(i * sequence_length, (i + 1) * sequence_length + 1)
      assert row["tokens"].tolist() == stream[at]
      assert row["tokens"].dtype == np.int32
      assert ("segment_ids" in row) == (join == "separate")
      if join == "separate":
        assert row["segment_ids"].tolist() == [number - segments[at][0] + 1 for number in segments[at]]

  def test_every_nth_document_is_held_out(self, tmp_path):
    documents = [f"document {i}" if i % 5 else "" for i in range(1, 30)]
    made = prepare(write_lines(tmp_path / "a.jsonl", documents), tmp_path / "out", heldout_every=4, sequence_length=1)
    # Empty documents count as documents here.
    for name, wanted in (
      ("heldout", documents[3::4]),
      ("train", [text for i, text in enumerate(documents) if i % 4 != 3]),
    ):
      tokens = rows(tmp_path / "out" / name)
      said = "".join("|" if token == EOS else chr(token - 3) for token in [tokens[0, 0], *tokens[:, 1]])
      assert said == "".join(f"{text}|" for text in wanted if text)
    assert made.heldout.documents + made.train.documents == sum(map(bool, documents))

  @pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "<u2"), (2**16, "<u2"), (2**16 + 1, "<i4")])
  def test_dtype(self, tmp_path, vocab_size, dtype):
    input = write_lines(tmp_path / "a.jsonl", ["some text"] * 9)
    assert prepare(input, tmp_path / "out", vocab_size=vocab_size).train.dtype == dtype
    assert rows(tmp_path / "out/train")[0, 0] == 3 + ord("s")

  def test_ids_above_16_bits(self, tmp_path):
    input = write_lines(tmp_path / "a.jsonl", ["some text"] * 9)
    prepare(input, tmp_path / "out", ByteTokenizer(shift=100_000), vocab_size=200_000)
    assert rows(tmp_path / "out/train")[0, 0] == 100_000 + ord("s")


@pytest.mark.compat
def test_same_bytes_whatever_the_workers(tmp_path, text, small_pieces):
  alone = prepare(text, tmp_path / "alone", **OPTIONS)
  prepare(text, tmp_path / "two", workers=2, **OPTIONS)
  assert contents(tmp_path / "alone") == contents(tmp_path / "two")
  assert {path.split("/")[0] for path in contents(tmp_path / "alone")} == {"source.json", "train", "heldout"}
  assert len(alone.train.shards) > 10
  assert alone.tokens_per_second > 0


def test_workers_name_the_bad_line_and_go(tmp_path, text):
  with open(text.with_name("1.jsonl"), "a") as file:
    file.write('{"text": 3}\n')
  with pytest.raises(ValueError, match=r"1\.jsonl, line 101: no text under 'text'"):
    prepare(text, tmp_path / "out", workers=1)
  assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from supra_jax.data import encoding
from supra_jax.data import packing
from supra_jax.data import text
from tests.data.test_packing import ByteTokenizer
input, output, when = sys.argv[1], sys.argv[2], sys.argv[3]

def slowly(*args, **options):
  print("began", flush=True)
  for piece in read(*args, **options):
    time.sleep(0.002)
    yield piece

if __name__ == "__main__":
  read, encoding.read_pieces, text.PIECE_BYTES = text.read_pieces, slowly, 500
  packing.prepare(input, ByteTokenizer(), output, vocab_size=259, sequence_length=8, heldout_every=10,
                  shard_bytes=5000, documents="separate", workers=int(when))
"""


def run_and_kill(text, output, *, shards, workers=0):
  """Packs in another process until so many files of rows are there, then kills it."""
  command = [sys.executable, "-c", KILLED, str(text), str(output), str(workers)]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  deadline = time.monotonic() + 240
  while len(list(output.with_name("out.partial").rglob("*.array_record"))) < shards and not output.exists():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    time.sleep(0.001)
  process.kill()
  process.communicate(timeout=240)
  with pytest.raises(ProcessLookupError):
    # Its workers, of the same group, end by themselves.
    while time.monotonic() < deadline:
      os.killpg(process.pid, 0)
      time.sleep(0.01)


class TestResume:
  @pytest.mark.parametrize(("shards", "workers"), [((0, 2, 9), 0), ((4,), 2)])
  def test_killed_at_any_moment_it_ends_with_the_same_bytes(self, tmp_path, text, small_pieces, shards, workers):
    prepare(text, tmp_path / "whole", **OPTIONS)
    for count in shards:
      run_and_kill(text, tmp_path / "out", shards=count, workers=workers)
      assert not (tmp_path / "out").exists()
      with pytest.raises(FileNotFoundError):
        loading.PackedDataset(tmp_path / "out/train")
    prepare(text, tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()

  @pytest.mark.parametrize("kind", ["write", "os.replace", "os.rename", "os.fsync"])
  def test_cut_off_between_any_two_steps(self, tmp_path, text, small_pieces, monkeypatch, kind):
    """What kill -9 cannot be timed to hit: each call of one kind is the last one once."""
    owner, name = (rows_writer.RowsWriter, "_write") if kind == "write" else (os, kind.split(".")[1])
    prepare(text, tmp_path / "whole", **OPTIONS)
    real, calls = getattr(owner, name), 0

    def count(*args, **options):
      nonlocal calls
      calls += 1
      return real(*args, **options)

    monkeypatch.setattr(owner, name, count)
    prepare(text, tmp_path / "counted", **OPTIONS)
    total = calls
    for last in sorted({0, 1, 2, total // 2, total - 2, total - 1} & set(range(total))):
      calls = 0

      def cut(*args, last=last, **options):
        nonlocal calls
        calls += 1
        if calls > last:
          raise KeyboardInterrupt
        return real(*args, **options)

      monkeypatch.setattr(owner, name, cut)
      with pytest.raises(KeyboardInterrupt):
        prepare(text, tmp_path / "out", **OPTIONS)
      monkeypatch.setattr(owner, name, real)
      assert not (tmp_path / "out").exists()
      prepare(text, tmp_path / "out", **OPTIONS)
      assert contents(tmp_path / "out") == contents(tmp_path / "whole")
      shutil.rmtree(tmp_path / "out")

  def test_goes_on_with_the_same_arguments_and_does_not_begin_again(self, tmp_path, text, small_pieces, monkeypatch):
    run_and_kill(text, tmp_path / "out", shards=20)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"out.partial is half-finished.*remove it.*heldout_every: 10 before, 9 now"):
      prepare(text, tmp_path / "out", **OPTIONS | {"heldout_every": 9})
    with pytest.raises(ValueError, match="tokenizer_sha256"):
      prepare(text, tmp_path / "out", ByteTokenizer(2), **OPTIONS)
    assert contents(tmp_path / "out.partial") == before

    encoded = []
    take = packing_job.Job.take
    monkeypatch.setattr(packing_job.Job, "take", lambda self, *args: encoded.append(args) or take(self, *args))
    prepare(text, tmp_path / "out", **OPTIONS)
    pieces = len(encoded)
    prepare(text, tmp_path / "whole", **OPTIONS)
    assert 0 < pieces < 0.8 * (len(encoded) - pieces)

  def test_nothing_finished_is_nothing_to_keep(self, tmp_path, text):
    (text.with_name("2.jsonl")).write_text("{\n")
    with pytest.raises(ValueError, match=r"line 1: not JSON"):
      prepare(text, tmp_path / "out", heldout_every=2)
    (tmp_path / "out.partial/journal.npz.tmp").write_bytes(b"cut off")
    write_lines(text.with_name("2.jsonl"), ["mended"])
    assert prepare(text, tmp_path / "out").heldout is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["source.json", "train"]

  def test_a_damaged_journal_and_a_strangers_directory(self, tmp_path, text):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which this program did not write"):
      prepare(text, tmp_path / "out")
    assert (partial / "thesis.tex").exists()
    (partial / "thesis.tex").unlink()
    (partial / packing_job.JOURNAL_FILE).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"journal\.npz cannot be read.*Remove"):
      prepare(text, tmp_path / "out")

  def test_two_at_once(self, tmp_path, text):
    with locked(tmp_path / "out.partial"), pytest.raises(ValueError, match="written by another process"):
      prepare(text, tmp_path / "out")


class TestAlreadyThere:
  def test_left_alone(self, tmp_path, text):
    made = prepare(text, tmp_path / "out", heldout_every=5)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / packing_job.JOURNAL_FILE).write_bytes(b"left by a run that was cut off at its last step")
    again = prepare(text, tmp_path / "out", heldout_every=5)
    assert again == packing.Prepared(made.train, made.heldout, None)
    shutil.rmtree(text.parent)
    prepare(text, tmp_path / "out", heldout_every=5)
    assert contents(tmp_path / "out") == before

  def test_refused(self, tmp_path, text):
    prepare(text, tmp_path / "out")
    with pytest.raises(ValueError, match=r"remove it or choose another.*sequence_length: 8 before, 9 now"):
      prepare(text, tmp_path / "out", sequence_length=9)
    write_lines(text.with_name("3.jsonl"), ["new"])
    with pytest.raises(ValueError, match=r"3\.jsonl: absent before, 16 now"):
      prepare(text, tmp_path / "out")
    next((tmp_path / "out/train").glob("*.array_record")).unlink()
    text.with_name("3.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="rows-00000"):
      prepare(text, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="no packed text"):
      prepare(text, tmp_path / "mine")

  def test_an_empty_directory_is_filled(self, tmp_path, text):
    (tmp_path / "out").mkdir()
    assert prepare(text, tmp_path / "out").train.rows


def test_refusals_leave_nothing(tmp_path):
  (tmp_path / "text").mkdir()
  input = write_lines(tmp_path / "text/a.jsonl", ["a long enough document"] * 3)
  no_ids = ByteTokenizer()
  no_ids.bos_id = None
  no_eos = ByteTokenizer()
  no_eos.eos_ids = ()
  for options, message in (
    ({"sequence_length": 0}, "sequence_length=0"),
    ({"documents": "apart"}, "documents='apart'"),
    ({"heldout_every": 1}, "heldout_every=1"),
    ({"workers": -1}, "workers=-1"),
    ({"heldout_every": 4}, r"The heldout part of .*: 0 documents gave 0 tokens, too few"),
    ({"tokenizer": no_ids, "bos": True}, "no begin-of-text"),
    ({"tokenizer": no_eos}, "no end-of-text"),
  ):
    with pytest.raises(ValueError, match=message):
      prepare(input, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
  with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the tokenizer gives ids .* vocab_size is 50"):
    prepare(input, tmp_path / "out", vocab_size=50)


def test_progress_away_from_a_terminal(capsys):
  with encoding.packing_progress(100, 20, seconds=0) as progress:
    progress.advance_to(60, tokens=3000, tokens_per_second=3000 / progress.elapsed)
  _, err = capsys.readouterr()
  assert err.startswith("packing, 60% of the input, 3.00k tokens, ") and err.endswith("tokens/s, 00:00 left\n")


@pytest.mark.compat
def test_the_program(tmp_path, text):
  from supra_jax.experiments import tiny

  model = tmp_path / "model"
  model.mkdir()
  (model / "tokenizer.json").write_bytes(tiny.tokenizer_json())
  (model / "config.json").write_text(tiny.tiny_config("supra").to_json())
  command = ["supra_jax.bin.prepare_data", f"--input={text}", f"--tokenizer={model}"]
  command += [f"--output={tmp_path}/out", "--sequence_length=32", "--heldout_every=10"]
  # Started as it is typed, and once more in this process.
  started = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
  for ran, said in ((started, "tokens/s."), (programs.run(*command), "All was packed before.")):
    assert ran.returncode == 0, ran.stderr
    train, heldout, last = ran.stdout.splitlines()
    assert train.startswith(f"{tmp_path}/out/train: 26") and heldout.startswith(f"{tmp_path}/out/heldout: ")
    assert last.endswith(said)
  ran = programs.run(*command, "--bos")
  assert ran.returncode == 1 and ran.stderr.startswith("error: bos=True"), ran.stderr
