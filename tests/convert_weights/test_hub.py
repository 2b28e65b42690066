"""Names on the hub, against a hub of our own on this machine."""

import functools
import http.server
import json
import re
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file
from tiny_checkpoints import copy_case, source_tensors

from convert_weights.errors import ConversionError
from convert_weights.hub import wanted_files
from convert_weights.open_source import open_source

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
CASE = "mistral_gqa"


class _Hub(http.server.BaseHTTPRequestHandler):
  """Serves DIRECTORY/COMMIT as the revisions of the model `some/model`, and remembers what was asked for."""

  protocol_version = "HTTP/1.1"

  def __init__(self, directory, asked, *args):
    self.directory, self.asked = directory, asked
    super().__init__(*args)

  def do_GET(self):
    self._answer()

  def do_HEAD(self):
    self._answer()

  def _answer(self):
    path = urlsplit(self.path).path
    if found := re.fullmatch(r"/some/model/resolve/(\w+)/(.+)", path):
      self.asked.add(found[2])
      data = (self.directory / found[1] / found[2]).read_bytes()
      return self._send(200, data, ETag=f'"{found[1][:8]}{found[2]}"', **{"X-Repo-Commit": found[1]})
    revision = re.fullmatch(r"/api/models/some/model(?:/(?:revision|tree)/(\w+))?", path)
    if revision is None:
      return self._send(401, b'{"error": "Repository not found"}', **{"X-Error-Code": "RepoNotFound"})
    commit = COMMITS.get(revision[1] or "main", revision[1])
    if commit not in COMMITS.values():
      return self._send(404, b'{"error": "Invalid rev id"}', **{"X-Error-Code": "RevisionNotFound"})
    files = sorted((self.directory / commit).iterdir())
    if "/tree/" in path:
      listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": commit} for f in files]
      return self._send(200, json.dumps(listed).encode())
    info = {"id": "some/model", "sha": commit, "siblings": [{"rfilename": f.name} for f in files]}
    return self._send(200, json.dumps(info).encode())

  def _send(self, status, data, **headers):
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *args):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """(what was asked for, what stops it); the model's second revision has another norm."""
  for name, commit in COMMITS.items():
    directory = copy_case(CASE, tmp_path / "hub" / commit)
    if name == "v2":
      tensors = source_tensors(CASE)
      save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, directory / "model.safetensors")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
      (directory / other).write_bytes(b"never asked for")
  asked = set()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Hub, tmp_path / "hub", asked))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()

  def stop():
    server.shutdown()
    server.server_close()
    thread.join()

  address = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setattr(constants, "ENDPOINT", address)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)
  yield asked, stop
  if thread.is_alive():
    stop()


def norm(source):
  (leaf,) = (leaf for leaf in open_source(source).leaves if leaf.path == ("norm", "weight"))
  return leaf.read()


def test_revisions_and_only_what_is_needed(hub):
  asked, stop = hub
  wanted = source_tensors(CASE)["model.norm.weight"]
  np.testing.assert_array_equal(norm("some/model"), wanted)
  assert asked == {"config.json", "generation_config.json", "model.safetensors"}
  np.testing.assert_array_equal(norm("some/model@v2"), wanted + 1)
  assert open_source("some/model@v2").name == f"some/model@{COMMITS['v2']}"
  stop()
  np.testing.assert_array_equal(norm("some/model"), wanted)  # from the cache
  np.testing.assert_array_equal(norm(f"some/model@{COMMITS['v2']}"), wanted + 1)


def test_what_the_hub_does_not_have(hub, tmp_path):
  for source, fragment in (
    ("no/model", "no/model is no path on this machine, and the hub says"),
    ("some/model@v3", "some/model@v3 is no path on this machine, and the hub says"),
    ("some/model@../x", "some/model@../x"),
    ("some/model/deeper", "some/model/deeper does not exist"),
  ):
    with pytest.raises(ConversionError) as caught:
      open_source(source)
    assert fragment in str(caught.value)
  for name in ("model.safetensors", "pytorch_model.bin"):
    (tmp_path / "hub" / COMMITS["main"] / name).unlink()
  with pytest.raises(ConversionError, match="some/model: the hub has no safetensors"):
    open_source("some/model")


def test_offline_says_so_at_once(hub):
  hub[1]()
  started = time.monotonic()
  with pytest.raises(
    ConversionError, match=r"some/model is no path .* hub cannot be reached .* cache does not have it"
  ):
    open_source("some/model")
  assert time.monotonic() - started < 5


def test_wanted_files():
  small = ["config.json", "tokenizer.json"]
  shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
  bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
  others = [
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "optimizer.bin",
    "a/model.safetensors",
  ]
  assert wanted_files([*others, *shards, *bins, *small, "x.gguf"]) == small + shards
  assert wanted_files([*others, *bins, *small]) == small + bins
  assert wanted_files(["x.gguf", "README.md"]) == ["x.gguf"]
  assert wanted_files(["x.gguf", "y.gguf", *small]) == wanted_files([*others, *small]) == []
