import contextlib
import functools
import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from supra_jax.core.files import locked, new_directory, temporary_directory
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layers
from supra_jax.storage import model_directory as checkpoint
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.storage.parameters import UnreadArray

CONFIG = tiny().replace(layers=layers(("supra", "softmax"), qk_norm=True), norm="layer_norm")
FILES = {"tokenizer.model": bytes(range(256)), "tokenizer_config.json": b"{}"}


def _save(directory, params, **changes):
  given = {"config": CONFIG, "params": params, "tokenizer_files": FILES, "source": {"name": "é", "n": [1, None]}}
  save_model(directory, **(given | changes))


def _assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert isinstance(g, jax.Array) and g.dtype == w.dtype and g.shape == w.shape
    np.testing.assert_array_equal(np.asarray(g).view(np.uint8), np.asarray(w).view(np.uint8))


def _unread(array):
  return UnreadArray(array.nbytes, lambda: np.asarray(array))


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(CONFIG)


@pytest.mark.compat
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, _unread])
def test_round_trip(stored, kind, params, tmp_path):
  params = jax.tree.map(lambda x: x.astype(stored), params)
  _save(tmp_path / "new" / "model", jax.tree.map(kind, params))
  got = load_model(str(tmp_path / "new" / "model"))
  assert got.config == CONFIG
  assert got.tokenizer_files == FILES
  assert got.source == {"name": "é", "n": [1, None]}
  _assert_same_bits(got.params, params)
  for wanted in ("float32", "bfloat16"):
    converted = load_model(tmp_path / "new" / "model", dtype=wanted).params
    _assert_same_bits(converted, jax.tree.map(lambda x, to=wanted: jnp.asarray(x).astype(to), params))
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_what_is_unread_lies_on_disk_as_what_orbax_itself_saves(params, tmp_path):
  _save(tmp_path / "model", jax.tree.map(_unread, params))
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "orbax", jax.tree.map(np.asarray, params))
    ours, theirs = (checkpointer.restore(path) for path in (tmp_path / "model" / "params", tmp_path / "orbax"))
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), ours, theirs)
  metadata = [
    json.loads((path / "_METADATA").read_text()) for path in (tmp_path / "model" / "params", tmp_path / "orbax")
  ]
  assert metadata[0] == metadata[1]


def test_unread_arrays_are_read_in_turn_and_once(params, tmp_path):
  read = []

  def unread(path, array):
    name = jax.tree_util.keystr(path)
    return UnreadArray(array.nbytes, lambda: read.append(name) or np.full(array.shape, len(read), np.float32))

  given = jax.tree_util.tree_map_with_path(unread, params)
  _save(tmp_path / "model", given, source=lambda: {"read": list(read)})
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  got = load_model(tmp_path / "model")
  assert got.source == {"read": names}
  assert [int(x.ravel()[0]) for x in jax.tree.leaves(got.params)] == list(range(1, len(names) + 1))


def test_parameters_of_another_model_are_refused(params, tmp_path):
  few = {name: tree for name, tree in params.items() if name != "norm"}
  head = params["lm_head"]
  wrong = few | {"lm_head": {**head, "kernel": head["kernel"][:, :-1]}, "left": {"over": np.zeros(1, np.float32)}}
  _save(tmp_path / "model", wrong)
  rows, columns = head["kernel"].shape
  said = r"model/params: .* norm/bias is missing; norm/weight is missing; left/over is of no use to it, and 1 more"
  with pytest.raises(ValueError, match=said):
    load_model(tmp_path / "model")
  _save(tmp_path / "narrow", wrong | {"norm": params["norm"]})
  said = rf"lm_head/kernel has shape \({rows}, {columns - 1}\), wanted \({rows}, {columns}\)\.$"
  with pytest.raises(ValueError, match=said):
    load_model(tmp_path / "narrow")


def test_more_than_the_disk_has_room_for_is_not_begun(tmp_path):
  huge = {"a": UnreadArray(2**60, lambda: pytest.fail("it was read"))}
  with pytest.raises(
    OSError, match=rf"1,152,921,504,606,846,976 bytes are to be written to {tmp_path}; [\d,]+ are free"
  ):
    _save(tmp_path / "model", huge)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.compat
def test_what_a_killed_process_left_is_replaced(params, tmp_path):
  left = temporary_directory(tmp_path / "model")
  (left / "params").mkdir(parents=True)
  (left / "params" / "junk").write_text("half of it")
  (left / "tokenizer.json").write_text("{")
  _save(tmp_path / "model", params)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  assert load_model(tmp_path / "model").tokenizer_files == FILES
  assert not list((tmp_path / "model").rglob("junk"))


def test_what_another_process_writes_is_left_to_it(params, tmp_path):
  other = temporary_directory(tmp_path / "model")
  with locked(other):
    (other / "params").mkdir()
    with pytest.raises(ValueError, match=r"model.partial-directory is being written by another process"):
      _save(tmp_path / "model", params)
    assert [path.name for path in tmp_path.rglob("*")] == ["model.partial-directory", "params"]


def test_nothing_is_left_though_a_thread_of_the_failed_write_goes_on(tmp_path):
  begun = threading.Event()

  def write(directory):
    for number in range(60):
      (directory / "params").mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):  # removed between the two
        (directory / "params" / str(number)).write_text("late")
      begun.set()
      time.sleep(0.01)

  with pytest.raises(OSError, match="disk full"), new_directory(tmp_path / "model") as partial:
    thread = threading.Thread(target=write, args=(partial,))
    thread.start()
    begun.wait()
    raise OSError("disk full")
  thread.join()
  assert list(tmp_path.iterdir()) == []


DAMAGES = {
  "no metadata": lambda params: (params / "_METADATA").unlink(),
  "half of the metadata": lambda params: (params / "_METADATA").write_bytes((params / "_METADATA").read_bytes()[:99]),
  "nothing": lambda params: [shutil.rmtree(x) if x.is_dir() else x.unlink() for x in params.iterdir()],
  "no manifest": lambda params: (params / "manifest.ocdbt").unlink(),
  "short files": lambda params: [path.write_bytes(path.read_bytes()[:-9]) for path in params.glob("**/d/*")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parameters_are_an_error_that_names_them(params, tmp_path, damage):
  _save(tmp_path / "model", params)
  DAMAGES[damage](tmp_path / "model" / "params")
  with pytest.raises(ValueError, match=rf"{tmp_path}/model/params: (no|the) parameters can(not)? be read"):
    load_model(tmp_path / "model")


@pytest.mark.parametrize(
  ("name", "contents", "said"),
  [
    ("source.json", b"", "not JSON, or a damaged file: Expecting value"),
    ("source.json", b"[]", r"wanted a JSON object, got \[\]"),
    ("config.json", b"", "not JSON, or a damaged file: Expecting value"),
    ("config.json", b"\xff\xfe", "not JSON, or a damaged file: 'utf-8' codec"),
    ("config.json", b"[]", "wanted an object"),
  ],
)
def test_a_damaged_file_is_named(params, tmp_path, name, contents, said):
  _save(tmp_path / "model", params)
  (tmp_path / "model" / name).write_bytes(contents)
  with pytest.raises(ValueError, match=f"{tmp_path}/model/{name}: .*{said}"):
    load_model(tmp_path / "model")


def test_odd_numbers_survive(params, tmp_path):
  size = params["norm"]["weight"].size
  weight = np.resize(np.array([np.nan, np.inf, -0.0, 1e-45, 3.4e38], np.float32), size)
  odd = {**params, "norm": {"weight": weight, "bias": np.arange(size, dtype=np.int32)}}
  _save(tmp_path / "model", odd)
  _assert_same_bits(load_model(tmp_path / "model").params, odd)
  assert (
    load_model(tmp_path / "model", dtype="bfloat16").params["norm"]["bias"].dtype == jnp.int32
  )  # only floats convert


def test_an_empty_directory_may_be_filled(params, tmp_path):
  (tmp_path / "model").mkdir()
  _save(tmp_path / "model", params, tokenizer_files={})
  assert load_model(tmp_path / "model").tokenizer_files == {}


def test_what_exists_is_left_alone(params, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "note").write_text("mine")
  (tmp_path / "file").write_text("mine")
  for name in ("model", "file"):
    with pytest.raises(FileExistsError, match=rf"{name} already exists"):
      _save(tmp_path / name, params)
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "model", "note"]


class _Interrupted(BaseException):
  pass


@pytest.mark.parametrize("where", ["params", "source", "interrupted", "tokenizer"])
def test_nothing_is_left_of_a_failed_save(where, params, tmp_path, monkeypatch):
  changes, error = {}, Exception
  if where == "params":
    changes["params"] = params | {"norm": {"weight": object()}}
  elif where == "source":  # after the parameters are written
    changes["source"] = {"name": object()}
  elif where == "tokenizer":
    changes["tokenizer_files"], error = {"vocab.txt": b""}, ValueError
  else:

    def stop(self):
      raise _Interrupted

    monkeypatch.setattr(type(CONFIG), "to_json", stop)
    error = _Interrupted
  with pytest.raises(error):
    _save(tmp_path / "model", params, **changes)
  assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_empty_directory(params, tmp_path):
  (tmp_path / "model").mkdir()
  with pytest.raises(TypeError):
    _save(tmp_path / "model", params, source={"name": object()})
  assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_no_model_is_said_so(params, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere is not a supra_jax model: there is no such directory"):
    load_model(tmp_path / "nowhere")
  _save(tmp_path / "model", params)
  shutil.move(tmp_path / "model" / checkpoint.PARAMS_DIRECTORY, tmp_path / "elsewhere")
  with pytest.raises(FileNotFoundError, match=r"model is not a supra_jax model: params is missing"):
    load_model(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "not json", '{"vocab_size": 3', "[]", '{"model_type": "llama"}'])
def test_a_broken_config_is_named(text, params, tmp_path):
  _save(tmp_path / "model", params)
  (tmp_path / "model" / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"model.config\.json"):
    load_model(tmp_path / "model")


def test_a_missing_source_is_no_error(params, tmp_path):
  _save(tmp_path / "model", params)
  (tmp_path / "model" / checkpoint.SOURCE_FILE).unlink()
  assert load_model(tmp_path / "model").source == {}
