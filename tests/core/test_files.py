"""Paths that are none of this machine's, and disks that lack what a local one has."""

import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import runs
from convert_weights import hf_to_orbax, orbax_to_hf, verify
from supra_jax.core.files import local, place
from supra_jax.core.run_record import write_run_record
from supra_jax.data.loading import PackedDataset
from supra_jax.data.packing import prepare
from supra_jax.data.text import read_documents
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.inference import lm
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Random
from supra_jax.storage.model_directory import load_model
from supra_jax.storage.parameter_reader import ParameterReader
from supra_jax.storage.run_states import RunStates
from supra_jax.training.loop import train
from supra_jax.training.metrics import MetricsWriter
from tests.support import poor_disk, programs


@pytest.fixture(scope="module")
def files(tmp_path_factory, quick_compilation) -> Path:
  """All that the doors want beside a URL: a model, text, a source to convert."""
  directory = tmp_path_factory.mktemp("files")
  tiny.write_checkpoint(directory / "model", "softmax")
  tiny.write_text(directory / "text.jsonl")
  orbax_to_hf.convert(directory / "model", directory / "source")
  return directory


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
  """A working directory with those files."""
  for path in files.iterdir():
    (tmp_path / path.name).symlink_to(path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _prepare(text, output):
  stored = load_model("model")
  tokenizer = Tokenizer.from_files(stored.tokenizer_files, stored.config)
  prepare(text, tokenizer, output, vocab_size=tiny.VOCAB, sequence_length=16, heldout_every=5, workers=0)


def _train(workdir="run", model="model", text="text.jsonl", **changes):
  train(runs.make_config(model, text, **changes), workdir)


# Where buckets will do.
DOORS = {
  "load": lm.load,
  "read parameters": ParameterReader,
  "linearize from": lambda url: linearize_checkpoint(url, "out", Random()),
  "linearize to": lambda url: linearize_checkpoint("model", url, Random()),
  "workdir": lambda url: _train(url),
  "init_checkpoint": lambda url: _train(model=url),
  "distill_from": lambda url: _train(distill_from=url),
  "sources": lambda url: _train(text="", data={"sources": f"{url}:0.5", "heldout": "model"}),
  "heldout": lambda url: _train(text="", data={"sources": url, "heldout": url}),
  "packed rows": PackedDataset,
  "pack to": lambda url: _prepare("text.jsonl", url),
  "states": lambda url: RunStates(url, keep=1),
  "convert to": lambda url: hf_to_orbax.convert("source", url),
  "export from": lambda url: orbax_to_hf.convert(url, "out"),
}
# Where they will not.
LOCAL_DOORS = {
  "text": lambda url: list(read_documents(f"{url}/*.jsonl")),
  "pack from": lambda url: _prepare(f"{url}/*.jsonl", "out"),
  "metrics": MetricsWriter,
  "run record": lambda url: write_run_record(url, {}),
  "convert from": lambda url: hf_to_orbax.convert(url, "out"),
  "tokenizer": lambda url: hf_to_orbax.convert("source", "out", tokenizer=url),
  "export to": lambda url: orbax_to_hf.convert("model", url),
  "verify source": lambda url: verify.compare(url, "model"),
}


def _refused(door, url, wanted, here):
  with pytest.raises(ValueError) as refused:
    door(url)
  said = str(refused.value)
  assert said.startswith(url) and wanted in said and "mount" in said and "\n" not in said
  assert not any(":" in path.name for path in here.iterdir())
  assert not (here / "out").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("url", ["s3://some-bucket/a/b", "hdfs://host:9000/a"])
def test_other_urls_are_refused(door, url, here):
  _refused(DOORS[door], url, "only gs://", here)


@pytest.mark.parametrize("door", LOCAL_DOORS)
@pytest.mark.parametrize("url", ["gs://some-bucket/a/b", "s3://some-bucket/a"])
def test_where_no_bucket_will_do_it_is_refused(door, url, here):
  _refused(LOCAL_DOORS[door], url, "only a local path", here)


def test_programs_say_it_in_one_line(here):
  flags = ("--input=text.jsonl", "--output=s3://b/rows", "--tokenizer=model")
  done = programs.run("supra_jax.bin.prepare_data", *flags)
  assert done.returncode == 1 and done.stderr.startswith("error: s3://b/rows") and done.stderr.count("\n") == 1


def test_what_is_no_url_is_a_path():
  for name in ("pydoc:topics", "C:/models/a", "data/a:/b", "a:0.5", "/tmp/gs:", "gs:", "1:2"):
    assert place(name) == local(name) == Path(name)
  # pathlib takes a slash away.
  for given in ("s3://bucket/a/b", Path("s3://bucket/a/b")):
    with pytest.raises(ValueError, match=r"^s3://bucket/a/b: "):
      place(given)
  with pytest.raises(ValueError, match=r"^file:///tmp/a is a URL: give the path alone"):
    place("file:///tmp/a")
  with pytest.raises(ValueError, match="wanted gs://BUCKET/NAME"):
    place("gs://bucket")


def test_a_home_directory_that_no_shell_expands(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert local("~/models/a") == place("~/models/a") == tmp_path / "models/a"
  assert local("~nobody-has-this-name/a") == Path("~nobody-has-this-name/a")


def test_buckets_need_gcsfs(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(ValueError, match=r"need `pip install 'supra_jax\[gcs\]'`\.$"):
    place("gs://never-seen-before/model")


def _contents(directory: Path) -> dict[str, bytes]:
  return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def _on_a_poor_disk(*what: str, moves: int = 0) -> int:
  """The exit status of `poor_disk`; what it says is shown where the test fails."""
  command = [sys.executable, "-m", "tests.support.poor_disk", str(moves), *what]
  return subprocess.run(command, cwd=runs.ROOT).returncode


def test_a_disk_that_renames_no_directories(files, tmp_path):
  """Killed while it writes a model, and rows; then both, and states of a run, in one process."""
  model, rows, states = (tmp_path / name for name in ("model", "rows", "states"))
  for directory in (model, rows, states):
    directory.mkdir()
    for path in files.iterdir():
      (directory / path.name).symlink_to(path)
  assert _on_a_poor_disk(f"model={model}", moves=2) == -signal.SIGKILL
  with pytest.raises(FileNotFoundError, match=r"out is not a supra_jax model: config.json is missing"):
    load_model(model / "out")
  assert _on_a_poor_disk(f"rows={rows}", moves=3) == -signal.SIGKILL
  assert _on_a_poor_disk(f"model={model}", f"rows={rows}", f"states={states}") == 0

  got, want = load_model(model / "out"), load_model(model / "model")
  assert (got.config, got.tokenizer_files, got.source) == (want.config, want.tokenizer_files, want.source)
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  assert _contents(model / "exported") == _contents(model / "source")
  assert {path.name for path in model.iterdir()} == {"model", "text.jsonl", "source", "out", "exported"}
  assert not list((model / "out").rglob("unfinished"))

  packed = _contents(rows / "out")
  (rows / "out").rename(rows / "poor")
  poor_disk.rows(rows)
  assert packed == _contents(rows / "out")
  assert not (rows / "out.partial").exists()
