"""States: read once, kept, forked, saved, loaded in another process, and refused where they do not belong."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import supra_jax
from benchmarks import runs
from supra_jax.experiments import tiny
from supra_jax.inference.state import FORMAT
from supra_jax.model.registry import layers

pytestmark = pytest.mark.usefixtures("quick_compilation")
MIXERS = {
  "supra": layers(("supra",) * 2),
  "hybrid": layers(("softmax", "supra_window"), window=5, sinks=2),
  "memory": layers(("memory",) * 2, window=5, sinks=2, retained=(6,), chunk=3),
}
LONG = "It was the best of times, it was the worst of times. " * 4


@pytest.fixture(scope="module", params=MIXERS)
def directory(request, tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", layers=MIXERS[request.param])


@pytest.fixture(scope="module")
def lm(directory):
  return supra_jax.load(directory)


def _leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves((state.decode, state.hidden))]


def test_what_was_read_is_not_read_again(lm):
  whole = lm.generate(LONG, max_new_tokens=20)
  state = lm.read(LONG)
  before = _leaves(state)
  assert lm.generate("", state=state, max_new_tokens=20) == whole
  # In pieces, as text whose tokens are those of the whole.
  ids = lm.tokenizer.encode(LONG)
  pieces = lm.read(ids[50:], lm.read(ids[:50]))
  assert lm.generate("", state=pieces, max_new_tokens=20) == whole
  assert lm.complete([ids[50:]], state=lm.read(ids[:50]), max_new_tokens=20)[0].text == whole
  # Nothing has changed it.
  for got, want in zip(_leaves(state), before, strict=True):
    np.testing.assert_array_equal(got, want)
  assert state.tokens[0].tolist() == ids and state.rows == 1
  assert state.size_bytes == sum(x.nbytes for x in before)
  assert lm.read([], state) is state


def test_many_questions_to_one_state(lm):
  state = lm.read(LONG)
  questions = ["Why", " was it", "?", "x" * 30]
  alone = [lm.generate(question, state=state, max_new_tokens=12) for question in questions]
  assert lm.generate(questions, state=state, max_new_tokens=12, rows=2) == alone
  assert lm.generate(questions, state=state.fork(4), max_new_tokens=12) == alone
  assert lm.generate(questions[1:3], state=state.fork(4).take([1, 2]), max_new_tokens=12) == alone[1:3]
  with pytest.raises(ValueError, match="The state has 3 rows: wanted 1 or 4"):
    lm.generate(questions, state=state.fork(3))
  with pytest.raises(ValueError, match="This state has 3 rows: take"):
    state.fork(3).fork(2)


def test_states_of_several_texts_go_on_together(lm):
  """Turn two of several conversations at a time."""
  first = lm.complete(["The name", "Once upon a time"], max_new_tokens=5, keep_state=True)
  states = [done.state for done in first]
  alone = [lm.generate(" and", state=state, max_new_tokens=9) for state in states]
  assert lm.generate([" and"] * 2, state=states, max_new_tokens=9) == alone
  with pytest.raises(ValueError, match="state has 1 states for 2 prompts"):
    lm.generate([" and"] * 2, state=states[:1])
  _, decoded = lm([[1, 2]])
  for wrong in (decoded, "x.state"):
    for use in (lm.generate, lm.read):
      with pytest.raises(ValueError, match="state is a"):
        use("a", state=wrong)
  for make in (lambda: states[0].take([]), lambda: states[0].take([7]), lambda: states[0].fork(2.5)):
    with pytest.raises(ValueError, match="wanted"):
      make()


def test_the_state_after_a_text_has_read_all_of_it(lm):
  (whole,) = lm.complete(["The name"], max_new_tokens=15)
  (first,) = lm.complete(["The name"], max_new_tokens=6, keep_state=True)
  assert first.state.tokens[0].tolist() == [*lm.tokenizer.encode("The name"), *first.tokens]
  (rest,) = lm.complete([""], state=first.state, max_new_tokens=9)
  assert first.tokens + rest.tokens == whole.tokens
  (more,) = lm.complete(["and"], state=first.state, max_new_tokens=3, keep_state=True)
  assert more.state.tokens[0].size == first.state.tokens[0].size + len(lm.tokenizer.encode("and", continues=True)) + 3


def test_another_process_goes_on(lm, directory, tmp_path):
  state = lm.read(LONG)
  state.save(tmp_path / "state")
  script = f"""
import json, supra_jax
lm, state = supra_jax.load({str(directory)!r}), supra_jax.load_state({str(tmp_path / "state")!r})
print(json.dumps(lm.generate(["", " and"], state=state, max_new_tokens=20)))
"""
  ran = subprocess.run([sys.executable, "-c", script], cwd=runs.ROOT, capture_output=True, text=True, check=True)
  assert json.loads(ran.stdout) == lm.generate(["", " and"], state=state, max_new_tokens=20)


def test_a_file_is_what_was_saved(lm, tmp_path):
  state = lm.read(LONG)
  for kept in (state, state.fork(3), lm.read("a")):
    kept.save(tmp_path / "state")  # in place of the one before
    got = supra_jax.load_state(tmp_path / "state")
    assert (got.rows, got.config, got.checkpoint) == (kept.rows, kept.config, kept.checkpoint)
    assert [x.tolist() for x in got.tokens] == [x.tolist() for x in kept.tokens]
    wanted = {name: x for name, x in _arrays(kept).items()}
    for name, x in _arrays(got).items():
      want = wanted[name][:, : x.shape[1]] if ".k" in name or ".v" in name else wanted[name]
      np.testing.assert_array_equal(x, want, err_msg=name)
  assert [path.name for path in tmp_path.iterdir()] == ["state"]
  if "softmax" not in lm.config.mixers:
    # Of a document of any length.
    lm.read(LONG * 10).save(tmp_path / "long")
    assert (tmp_path / "long").stat().st_size - (tmp_path / "state").stat().st_size < 5 * len(LONG) * 10


def _arrays(state):
  leaves, _ = jax.tree_util.tree_flatten_with_path((state.decode, state.hidden))
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def test_it_is_of_one_model(lm, directory, tmp_path):
  state = lm.read("The name")
  other = supra_jax.load(tiny.write_checkpoint(tmp_path / "other", "supra", layers=lm.config.layers, seed=1))
  assert other.config == lm.config
  for use in (lambda: other.generate("", state=state), lambda: other.read("a", state)):
    with pytest.raises(ValueError, match=f"The state is of the checkpoint {lm.checkpoint}, and this model of "):
      use()
  wider = supra_jax.load(tiny.write_checkpoint(tmp_path / "wider", "supra", hidden_size=96))
  wider.checkpoint = None
  with pytest.raises(ValueError, match="The state is of another model"):
    wider.read("a", state)
  with pytest.raises(ValueError, match="The state is of another model: its config or dtype, float32"):
    supra_jax.load(directory, "bfloat16").read("a", state)
  # A copy of the model is the same model.
  assert supra_jax.load(directory).generate("", state=state, max_new_tokens=3) == lm.generate(
    "The name", max_new_tokens=3
  )


def test_nothing_to_read(lm):
  with pytest.raises(ValueError, match="Token 99999 is not in the vocabulary"):
    lm.read([99999])
  with pytest.raises(ValueError, match="The prompt is empty"):
    LMWithoutStart = supra_jax.LM(lm.config.replace(bos_token_id=None, eos_token_ids=()), lm.params, lm.tokenizer)
    LMWithoutStart.read("")
  with pytest.raises(ValueError, match="no tokenizer: give token ids"):
    supra_jax.LM(lm.config, lm.params).read("a")
  with pytest.raises(FileNotFoundError):
    supra_jax.load_state("no/such/state")


def _changed(change):
  def damage(path):
    with safetensors.safe_open(path, framework="numpy") as opened:
      about, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about, arrays = change(dict(about), dict(arrays))
    safetensors.numpy.save_file(arrays, path, about)

  return damage


def _without(name_in):
  return _changed(lambda about, arrays: (about, {n: x for n, x in arrays.items() if n != name_in(arrays)}))


def _of_a_layer(arrays):
  return next(name for name in sorted(arrays) if name.startswith("layers.1."))


def _as_float16(name, arrays):
  return {name: np.asarray(arrays[name], np.float16)}


DAMAGES = {
  "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
  "empty": lambda path: path.write_bytes(b""),
  "text": lambda path: path.write_text("It was the best of times."),
  "a header that promises much": lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
  "format": _changed(lambda about, arrays: (about | {"format": "supra_jax state 9"}, arrays)),
  "no config": _changed(lambda about, arrays: ({"format": FORMAT}, arrays)),
  "another config": _changed(lambda about, arrays: (about | {"config": "{}"}, arrays)),
  "no array": _without(_of_a_layer),
  "no tokens": _without(lambda arrays: "tokens.0"),
  "no counter": _without(lambda arrays: "cached"),
  "left over": _changed(lambda about, arrays: (about, arrays | {"layers.9.s": np.zeros(3, np.float32)})),
  "shape": _changed(lambda about, arrays: (about, arrays | {_of_a_layer(arrays): np.zeros(3, np.float32)})),
  "dtype of a layer": _changed(lambda about, arrays: (about, arrays | _as_float16(_of_a_layer(arrays), arrays))),
  "dtype": _changed(lambda about, arrays: (about, arrays | {"position": arrays["position"].astype(np.float32)})),
  "capacity": _changed(lambda about, arrays: (about | {"capacity": "1000000000000"}, arrays)),
  "no capacity": _changed(lambda about, arrays: (about | {"capacity": "many"}, arrays)),
  "unknown tokens": _changed(lambda about, arrays: (about, arrays | {"tokens.0": arrays["tokens.0"] + 100_000})),
  "a short cache": _changed(lambda about, arrays: (about | {"capacity": "1"}, arrays)),
  "a position before the first": _changed(lambda about, arrays: (about, arrays | {"position": arrays["position"] - 9})),
  "a config without end": _changed(lambda about, arrays: (about | {"config": "[" * 100_000}, arrays)),
  "two rows of tokens": _changed(lambda about, arrays: (about, arrays | {"tokens.01": arrays["tokens.0"]})),
  "fewer tokens": _changed(lambda about, arrays: (about, arrays | {"tokens.0": arrays["tokens.0"][:-1]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(lm, damage, tmp_path):
  path = tmp_path / "state"
  lm.read("The name").save(path)
  DAMAGES[damage](path)
  with pytest.raises(ValueError, match=rf"^{path}: (not a state, or a damaged one|its format is|a damaged state)"):
    supra_jax.load_state(path)


def test_a_failed_save_leaves_the_file_that_was_there(lm, tmp_path):
  path = tmp_path / "state"
  lm.read("The name").save(path)
  before = path.read_bytes()
  with pytest.raises(OSError):
    lm.read("a").save(tmp_path / "no" / "state")
  (tmp_path / "directory").mkdir()
  with pytest.raises(OSError, match="directory is a directory or a device"):
    lm.read("a").save(tmp_path / "directory")
  assert sorted(x.name for x in tmp_path.iterdir()) == ["directory", "state"]
  assert path.read_bytes() == before
