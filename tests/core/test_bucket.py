"""Models, packed rows and runs in a bucket, which a server of Google Cloud Storage's API on this machine keeps."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import runs
from supra_jax.core import bucket
from supra_jax.core.files import place
from supra_jax.data import loading, packed
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, load_model_without_params, save_model
from supra_jax.storage.parameter_reader import ParameterReader
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
from tests.support import gcs

pytestmark = pytest.mark.usefixtures("quick_compilation")
GS = f"gs://{gcs.BUCKET}"


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
  with gcs.running(cache=tmp_path_factory.mktemp("cache")):
    yield


def _there(directory: str) -> list[str]:
  return sorted(bucket.checksums(place(directory)))


# Of what is on the disk and stays as it is.
_stored = functools.cache(load_model)


def _assert_same_params(got, want):
  jax.tree.map(np.testing.assert_array_equal, load_model(got).params, _stored(want).params)


def _save(start, url, **changes):
  model = _stored(start)
  given = {"config": model.config, "params": model.params, "tokenizer_files": model.tokenizer_files, "source": {"a": 1}}
  save_model(url, **given | changes)


def test_a_model_is_what_was_saved(start):
  url = f"{GS}/models/a"
  _save(start, url)
  got, want = load_model(url), _stored(start)
  assert (got.config, got.tokenizer_files, got.source) == (want.config, want.tokenizer_files, {"a": 1})
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  with ParameterReader(Path(url)) as reader:  # pathlib takes a slash away
    path = ("embed_tokens", "embedding")
    np.testing.assert_array_equal(reader.read(path), want.params["embed_tokens"]["embedding"])
  # The same files as on a disk, but for the names that Orbax draws.
  on_disk = sorted(str(path.relative_to(start)) for path in start.rglob("*") if path.is_file())
  assert [name for name in _there(url) if "/d/" not in name] == [name for name in on_disk if "/d/" not in name]
  with pytest.raises(FileExistsError, match="gs://bucket/models/a already exists"):
    _save(start, url)
  _assert_same_params(url, start)


def test_what_is_half_written_is_no_model_and_gives_way(start):
  url = f"{GS}/models/killed"
  _save(start, url)
  # As a kill before the last file leaves it.
  (place(url) / "config.json").unlink()
  (place(url) / "unfinished").write_text("")
  (place(url) / "params" / "junk").write_text("of another model")
  with pytest.raises(FileNotFoundError, match=r"killed is not a supra_jax model: config.json is missing"):
    load_model_without_params(url)
  _save(start, url)
  _assert_same_params(url, start)
  assert not [name for name in _there(url) if "junk" in name or "unfinished" in name]


def test_a_model_is_whole_when_its_config_is_there(start):
  """What a kill at any time leaves, as the bucket had it then."""
  seen = []
  _save(start, f"{GS}/models/order", source=lambda: seen.extend(_there(f"{GS}/models/order")) or {})
  assert "params/commit_success.txt" in seen and "tokenizer.json" in seen and "unfinished" in seen
  assert "config.json" not in seen
  with pytest.raises(TypeError):
    _save(start, f"{GS}/models/failed", source={"name": object()})
  assert _there(f"{GS}/models/failed") == []


def test_a_bucket_that_is_not_there_is_named():
  with pytest.raises(ValueError, match=r"^gs://nobodys does not exist, or you may not read it.$") as refused:
    load_model("gs://nobodys/model")
  assert "\n" not in str(refused.value)


def test_packed_rows_are_those_of_a_disk(start, text, tmp_path):
  model = _stored(start)
  tokenizer = Tokenizer.from_files(model.tokenizer_files, model.config)
  given = {"vocab_size": tiny.VOCAB, "sequence_length": 32, "heldout_every": 5, "workers": 0, "shard_bytes": 10_000}
  url, disk = f"{GS}/rows", str(tmp_path / "rows")
  made = prepare(str(text), tokenizer, url, **given)
  assert len(made.train.shards) > 2
  assert made.train == prepare(str(text), tokenizer, disk, **given).train
  names = [str(path.relative_to(disk)) for path in Path(disk).rglob("*") if path.is_file()]
  assert _there(url) == sorted(names)
  for name in names:
    assert (place(url) / name).read_bytes() == Path(disk, name).read_bytes()
  assert prepare(str(text), tokenizer, url, **given).tokens_per_second is None  # all was there
  with pytest.raises(ValueError, match="was packed from other text or with other arguments"):
    prepare(str(text), tokenizer, url, **given | {"sequence_length": 16})

  sources = [loading.parse_sources(f"{where}/train:0.5,{where}/heldout") for where in (url, disk)]
  loaders = [loading.make_loader(source, batch_size=4, seed=1) for source in sources]
  for _ in range(20):
    batches = [next(loader)["tokens"] for loader in loaders]
    np.testing.assert_array_equal(*batches)
  assert packed.verify(f"{url}/train") == made.train

  # Bytes of the same number, never read here before.
  shard = made.heldout.shards[0]
  shutil.rmtree(bucket.cache_directory())
  broken = place(f"{url}/heldout") / shard.file
  contents = bytearray(broken.read_bytes())
  contents[len(contents) // 2] ^= 1
  broken.write_bytes(bytes(contents))
  with pytest.raises(ValueError, match=r"gs://bucket/rows/heldout/rows-00000.array_record: not the bytes"):
    loading.PackedDataset(f"{url}/heldout")
  broken.unlink()
  with pytest.raises(FileNotFoundError, match=r"gs://bucket/rows/heldout/rows-00000.array_record is missing"):
    loading.PackedDataset(f"{url}/heldout")


def test_a_run_goes_on_bit_for_bit_though_killed_and_though_a_state_is_damaged(start, text, tmp_path, capfd):
  _save(start, f"{GS}/start")
  config = runs.make_config(f"{GS}/start", text, num_steps=100, save_every=20, keep_checkpoints=3)
  train(config, tmp_path / "run")

  run, url = runs.Run(config, f"{GS}/run", recipe=tmp_path / "recipe.py"), f"{GS}/run"
  run.until((place(url) / "training" / "40" / "commit_success.txt").exists)
  run.send(signal.SIGKILL)
  assert run.wait() == [-signal.SIGKILL]
  assert not (place(url) / "checkpoint").exists()
  # All that a state was saved after is in the bucket, and the newest is damaged there.
  steps = sorted(int(path.parent.name) for path in (place(url) / "training").glob("*/commit_success.txt"))
  assert max(record["step"] for record in read_metrics(f"{url}/metrics.jsonl")) >= steps[-1]
  (largest,) = (place(url) / "training" / str(steps[-1]) / "state" / "d").iterdir()
  largest.write_bytes(largest.read_bytes()[:-1] + b"x")

  train(config, url)
  said = capfd.readouterr().err
  assert f"{url}/training/{steps[-1]} is damaged: state/d/{largest.name} is not what was written" in said
  assert f"It was moved to {url}/damaged/{steps[-1]}-" in said

  def losses(path):
    return [(record["step"], record.get("loss"), record.get("heldout_nll")) for record in read_metrics(path)]

  assert losses(f"{url}/metrics.jsonl") == losses(tmp_path / "run" / "metrics.jsonl")
  _assert_same_params(f"{url}/checkpoint", tmp_path / "run" / "checkpoint")
  names = _there(url)
  assert {"loss.png", "train_config.json", "data/train/meta.json"} <= set(names)
  assert sum(name.startswith("tensorboard/events") for name in names) == 2
  assert len((place(url) / "runs.jsonl").read_text().splitlines()) == 2
  assert json.loads((place(url) / "training" / "100" / "position" / "metadata").read_text())
