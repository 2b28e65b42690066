"""Names on the hub, against a hub of our own on this machine."""

import functools
import http.server
import json
import re
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from huggingface_hub import constants
from safetensors.numpy import save_file
from tiny_checkpoints import copy_case, source_tensors, split_gguf, write_gguf

from convert_weights.errors import ConversionError
from convert_weights.hub import wanted_small_files, wanted_weights
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
    if path.startswith("/gated/model/resolve/") or ("/gated/model" in path and not self.server.open_description):
      return self._send(self.server.refusal, b"Access is restricted.", **self.server.refusal_headers)
    if path == "/api/models/gated/model":
      info = {"id": "gated/model", "sha": "c" * 40, "siblings": [{"rfilename": "model.safetensors"}], "gated": "manual"}
      return self._send(200, json.dumps(info).encode())
    revision = re.fullmatch(r"/api/models/some/model(?:/(?:revision|tree)/(\w+))?", path)
    if revision is None:
      return self._send(401, b'{"error": "Repository not found"}', **{"X-Error-Code": "RepoNotFound"})
    commit = COMMITS.get(revision[1] or "main", revision[1])
    if commit not in COMMITS.values():
      return self._send(404, b'{"error": "Invalid rev id"}', **{"X-Error-Code": "RevisionNotFound"})
    root = self.directory / commit
    files = {f.relative_to(root).as_posix(): f.stat().st_size for f in sorted(root.rglob("*")) if f.is_file()}
    if "/tree/" in path:
      listed = [{"type": "file", "path": name, "size": size, "oid": commit} for name, size in files.items()]
      return self._send(200, json.dumps(listed).encode())
    info = {"id": "some/model", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    return self._send(200, json.dumps(info).encode())

  def _send(self, status, data, **headers):
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(data)), "Connection": "close"} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *args):
    pass


class _Running(NamedTuple):
  asked: set
  stop: Callable[[], None]
  server: http.server.ThreadingHTTPServer

  def __iter__(self):
    return iter((self.asked, self.stop))


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """What was asked for, what stops it, and the server; the model's second revision has another norm."""
  for name, commit in COMMITS.items():
    directory = copy_case(CASE, tmp_path / "hub" / commit)
    if name == "v2":
      tensors = source_tensors(CASE)
      save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, directory / "model.safetensors")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "never_read.txt"):
      (directory / other).write_bytes(b"never asked for")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
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
  yield _Running(asked, stop, server)
  if thread.is_alive():
    stop()


def norm(source):
  (leaf,) = (leaf for leaf in open_source(source).leaves if leaf.path == ("norm", "weight"))
  return leaf.read()


def test_revisions_and_only_what_is_needed(hub):
  asked, stop = hub
  wanted = source_tensors(CASE)["model.norm.weight"]
  np.testing.assert_array_equal(norm("some/model"), wanted)
  assert asked == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
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
  for name in ("consolidated.safetensors", "model.safetensors", "pytorch_model.bin"):
    (tmp_path / "hub" / COMMITS["main"] / name).unlink()
  with pytest.raises(ConversionError, match="some/model: the hub has no safetensors"):
    open_source("some/model")


def test_offline_says_so_at_once(hub):
  hub.stop()
  started = time.monotonic()
  with pytest.raises(
    ConversionError, match=r"some/model is no path .* hub cannot be reached .* cache does not have it"
  ):
    open_source("some/model")
  assert time.monotonic() - started < 5


def test_wanted_weights():
  shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
  bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
  others = [
    "config.json",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "optimizer.bin",
    "a/model.safetensors",
  ]
  assert wanted_weights("some/model", [*others, *shards, *bins, "x.gguf"], None) == shards
  assert wanted_weights("some/model", [*others, *bins], None) == bins
  assert wanted_weights("some/model", ["x.gguf", "README.md"], None) == ["x.gguf"]
  assert wanted_weights("some/model", [*others, *bins], "model.fp16.safetensors") == ["model.fp16.safetensors"]


QUANTISATIONS = [
  "m-F16.gguf", "m-BF16.gguf", "m-IQ4_XS.gguf", "m-Q4_K.gguf", "m-Q4_K_M.gguf", "m.Q8_0.gguf",
  "Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf", "m-Q5_0-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
  "chosen, wanted",
  [
    ("m-Q4_K.gguf", ["m-Q4_K.gguf"]),
    ("Q4_K", ["m-Q4_K.gguf"]),
    ("F16", ["m-F16.gguf"]),
    ("q8_0", ["m.Q8_0.gguf"]),
    ("Q6_K", ["Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf"]),
    ("Q6_K/m-Q6_K-00002-of-00002.gguf", ["Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf"]),
  ],
)
def test_one_of_several_quantisations(chosen, wanted):
  assert wanted_weights("some/model", ["config.json", *QUANTISATIONS], chosen) == wanted


@pytest.mark.parametrize(
  "files, chosen, fragment",
  [
    (QUANTISATIONS, None, r"Choose one, as in some/model:Q6_K/m-Q6_K-00001-of-00002\.gguf\.\nweights \(8\):"),
    (QUANTISATIONS, "m", r"Give more of it\.\nweights \(8\):"),
    (QUANTISATIONS, "Q4_XS", r"no weights of that name\.\nweights \(9\):\n  Q6_K/m-"),
    (QUANTISATIONS, "Q5_0", r"missing parts \(1\):\n  m-Q5_0-00001-of-00002\.gguf"),
    (["config.json", "a/model.safetensors"], None, "some/model: the hub has no safetensors"),
    (
      ["adapter_config.json", "adapter_model.safetensors"],
      None,
      "some/model: holds a LoRA adapter .* and no model: merge it",
    ),
    (
      ["adapter_config.json", "config.json", "model.safetensors"],
      None,
      "some/model: holds a LoRA adapter .* beside the model",
    ),
    (
      ["consolidated.00.pth", "params.json", "tokenizer.model"],
      None,
      r"some/model: holds the original .*consolidated\.00",
    ),
  ],
)
def test_refused_weights(files, chosen, fragment):
  with pytest.raises(ConversionError, match=fragment):
    wanted_weights("some/model", files, chosen)


def test_small_files():
  """All that transformers reads of a tokenizer, and what says how a model is licensed."""
  wanted = [
    "README.md", "adapter_config.json", "added_tokens.json", "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json", "merges.txt", "params.json",
    "qwen.tiktoken", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tekken.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
  ]  # fmt: skip
  assert (
    sorted(wanted_small_files([*wanted, "original/params.json", "onnx/config.json", "x.json", "a.jinja"])) == wanted
  )


@pytest.fixture
def quantisations(hub, tmp_path):
  """The hub's first revision holds three GGUF models, one of them in two parts, and a config.json of one line."""
  directory = tmp_path / "hub" / COMMITS["main"]
  for file in directory.iterdir():
    file.unlink()
  (directory / "config.json").write_text('{"model_type": "llama"}')
  (directory / "Q8").mkdir()
  write_gguf(directory / "m-F32.gguf")
  write_gguf(directory / "m-F16.gguf", quantisation={"ffn_down": GGMLQuantizationType.F16})
  split_gguf(directory / "m-F32.gguf", directory / "Q8" / "m", 2)
  return hub


def test_a_gguf_by_name(quantisations, tmp_path):
  asked, stop = quantisations
  with pytest.raises(ConversionError, match=r"Choose one, as in some/model:.*\n.*\n  Q8/m-00001.*\n  m-F16.*\n  m-F32"):
    open_source("some/model")
  assert not asked
  opened = open_source("some/model:F16")
  assert asked == {"config.json", "m-F16.gguf"}
  assert opened.name == f"some/model@{COMMITS['main']}:m-F16.gguf" and opened.kind == "gguf"
  opened = open_source("some/model@main:Q8")
  assert asked == {"config.json", "m-F16.gguf", "Q8/m-00001-of-00002.gguf", "Q8/m-00002-of-00002.gguf"}
  assert len(opened.weight_files) == 2
  stop()
  assert open_source("some/model:m-F16.gguf").kind == "gguf"  # from the cache
  with pytest.raises(ConversionError, match=r"no weights of that name\.\n.*\n  Q8/m-00001"):
    open_source("some/model:F32")


@pytest.mark.parametrize("status, headers", [(401, {"X-Error-Code": "GatedRepo"}), (403, {})])
@pytest.mark.parametrize("open_description", [True, False])
def test_a_gated_model(hub, status, headers, open_description):
  hub.server.refusal, hub.server.refusal_headers = status, headers
  hub.server.open_description = open_description
  with pytest.raises(ConversionError) as caught:
    open_source("gated/model")
  said = str(caught.value)
  assert re.search(
    r"accept the model's terms on http://127\.0\.0\.1:\d+/gated/model, log in .*`hf auth login`", said
  ), said
  assert "download failed" not in said
