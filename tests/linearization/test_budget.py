"""A memory within a budget: what it holds is what was asked for, and what is printed, at any length of text."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.core.sharding import make_mesh
from supra_jax.experiments.tiny import tokenizer_json
from supra_jax.linearization.budget import remembered, within
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Memory
from supra_jax.model import presets
from supra_jax.model.costs import sequence_bytes
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import save_model
from tests.evaluation import copying
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = presets.tiny("softmax").replace(num_heads=6, num_kv_heads=3)


def batches(rows=2, length=64):
  return [{"tokens": np.random.default_rng(0).integers(0, 97, (rows, length + 1)).astype(np.int32)}]


@pytest.mark.parametrize(
  "budget",
  [
    {"state_tokens": 40},
    {"state_bytes": 20_000},
    {"state_tokens": 31, "patterns": 1},
    {"state_tokens": 300},  # more than the rows have
  ],
)
def test_the_budget_is_kept_and_used(budget, random_params):
  params = random_params(TEACHER)
  start, mesh = Memory(chunk=2, window=4, **budget), make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    new, config, found = remembered((params, TEACHER), start, batches(), mesh, range(TEACHER.num_layers))
  a_token = TEACHER.num_layers * 3 * (TEACHER.head_dim + TEACHER.value_width) * 2
  asked = budget.get("state_bytes", budget.get("state_tokens", 0) * a_token)
  assert 0.9 * asked < sequence_bytes(config, 1) <= asked
  assert len(set(config.layers)) <= start.patterns
  lost = found["nats_lost"]
  assert 0 <= lost["sizes_of_heads"] <= lost["one_size"]
  read = jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t, method="logits")[0])
  assert np.isfinite(read(new, batches()[0]["tokens"])).all()


def test_a_memory_larger_than_the_text_is_the_teacher(random_params):
  """Whatever the order of the heads is now."""
  params = random_params(TEACHER)
  start, mesh = Memory(chunk=2, state_tokens=300, state_dtype="float32"), make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.warns(UserWarning, match="hold 208 tokens, and the rows that .* have 64: they say"):
    new, config, _ = remembered((params, TEACHER), start, batches(), mesh, range(TEACHER.num_layers))
  tokens = batches(length=30)[0]["tokens"]
  want, got = (
    jax.jit(lambda p, t, c=c: Transformer(c).apply({"params": p}, t, method="logits")[0])(p, tokens)
    for p, c in ((params, TEACHER), (new, config))
  )
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_does_not_fit(random_params):
  with pytest.raises(
    ValueError,
    match=r"state_tokens=12: wanted at least [\d,]+, for 4 first tokens \(sinks\), the last 8 \(window\) and up to 8",
  ):
    within(Memory(state_tokens=12), TEACHER, range(2))
  with pytest.raises(ValueError, match="makes memory layers"):
    linearize({}, TEACHER, Memory(), mixer="supra")
  with pytest.raises(ValueError, match=r"no tokenizer to read pydoc:topics with: .*Window .* reads none"):
    linearize(random_params(TEACHER), TEACHER)
  with pytest.raises(ValueError, match=r"state_tokens=9000: that is 9,000 tokens .* own context is 2,048"):
    within(Memory(state_tokens=9000), TEACHER.replace(max_positions=2048), range(2))
  sliding = TEACHER.replace(sliding_window=16)
  with pytest.raises(ValueError, match="sees 16 tokens, fewer than the last 17 of a memory"):
    linearize(random_params(TEACHER), sliding, Memory())


def test_a_teacher_with_a_sliding_window(random_params):
  """Its memory goes beyond that window, but sees nothing from further away."""
  config, told = TEACHER.replace(sliding_window=40), Memory(state_tokens=300, recall_weight=0)
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, made, _ = remembered((random_params(config), config), told, batches(), mesh, range(2))
  layer = made.layers[0]
  assert layer.window + layer.chunk <= 40 and max(layer.retained) > 40
  assert mixer_class("memory").reach(made, layer) == layer.window + 3 * layer.chunk + layer.sinks
  assert mixer_class("memory").reach(made.replace(sliding_window=4096), layer) == 4095


def test_heads_that_rope_tells_apart_keep_their_order(random_params):
  config = TEACHER.replace(rope=TEACHER.rope.__class__(kind="by_head"))
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, made, _ = remembered((random_params(config), config), Memory(chunk=2), batches(), mesh, range(2))
  assert all(len(layer.retained) == 1 for layer in made.layers)


def test_the_program(tmp_path, random_params):
  """What it prints is what a state of any text takes."""
  files = {"tokenizer.json": tokenizer_json()}
  teacher = TEACHER.replace(vocab_size=512)
  save_model(tmp_path / "teacher", config=teacher, params=random_params(teacher), tokenizer_files=files, source={})
  text = tmp_path / "text.txt"
  text.write_text("\n\n".join(["the state of a model remembers what it read " * 40] * 60))
  run = functools.partial(programs.run, "supra_jax.bin.linearize", f"--checkpoint={tmp_path}/teacher")
  told = [
    f"--output={tmp_path}/memory",
    "--state_bytes=20kB",
    f"--calibration_data={text}",
    "--calibration_tokens=2048",
  ]
  done = run(*told)
  assert done.returncode == 0, done.stderr
  lm = supra_jax.load(tmp_path / "memory")
  states = [lm.read(prompt) for prompt in ("the", "the state of a model remembers " * 40)]
  assert states[0].size_bytes == states[1].size_bytes <= 20_000
  assert f"{states[0].size_bytes:,} bytes of state at any length" in done.stdout
  assert f"Read 2,048 tokens of {text}. " in done.stdout
  source = json.loads((tmp_path / "memory" / "source.json").read_text())
  assert source["start"]["state_bytes"] == 20_000 and len(source["retained"]) == TEACHER.num_layers
  for flags, message in [
    (["--state_bytes=20kB", "--state_tokens=40"], "--state_bytes and --state_tokens both say how large"),
    (
      ["--state_bytes=20k"],
      "--state_bytes=20k: wanted a number and one of TB, TiB, GB, GiB, MB, MiB, kB, KiB, as in 6MB",
    ),
    (["--state_tokens=40", "--method=window"], "--state_tokens does not apply to --method=window, but to"),
    (["--state_tokens=40", "--decay=none"], "--decay does not apply to --method=memory"),
    (["--qk_norm"], "--qk_norm does not apply to --method=memory (the default), but to --method=window or calibrated"),
    (
      ["--window=8", "--calibration_tokens=64"],
      "--calibration_tokens does not apply to --method=window (which --window without a size means), but",
    ),
    (["--state_bytes=1kB"], "state_bytes=1,000: wanted at least"),
    (["--state_bytes=1,000"], "state_bytes=1,000: wanted at least"),
    (["--calibration_data="], "The text to calibrate on has no name"),
    ([f"--output={text}/memory"], f"{text} is a file, so that no directory can be made below it"),
  ]:
    refused = run(f"--output={tmp_path}/refused", *flags)
    assert refused.returncode != 0 and message in refused.stderr, (flags, refused.stderr)
    assert not (tmp_path / "refused").exists()


INSIDE = """
import jax, numpy as np
from supra_jax.core.sharding import make_mesh
from supra_jax.linearization.budget import remembered
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Memory
from supra_jax.model import presets
from supra_jax.model.placement import param_shardings, placed
from supra_jax.model.transformer import Transformer

config = presets.tiny("softmax").replace(num_heads=8, num_kv_heads=4, vocab_size=96)
params = Transformer(config).init(jax.random.key(0), np.zeros((1, 4), int), method="logits")["params"]
rows = [{"tokens": np.random.default_rng(0).integers(0, 96, (2, 65)).astype(np.int32)}]
tokens = np.arange(48).reshape(1, 48)
logits = {}
for text in ("fsdp:2", "tensor:2"):
  mesh = make_mesh(text)
  with jax.set_mesh(mesh):
    theirs = jax.device_put(params, param_shardings(params, mesh))
    start = Memory(chunk=2, state_tokens=30, state_dtype="float32")
    new, made, _ = remembered((theirs, config), start, rows, mesh, range(2))
    model = Transformer(made)
    state = placed(model.init_state(1, 0), made, mesh)
    read = jax.jit(lambda p, t, s: model.apply({"params": p}, t, s, method="logits")[0])
    logits[text] = np.asarray(read(new, tokens, state))
    # On one device the same parameters say the same.
    alone = Transformer(made).apply({"params": jax.device_get(new)}, tokens, method="logits")[0]
    np.testing.assert_allclose(logits[text], np.asarray(alone), atol=1e-4)
  if text == "fsdp:2":
    assert any(len(set(layer.retained)) > 1 and len(layer.retained) == 4 for layer in made.layers), made.layers
    try:
      placed(model.init_state(1, 0), made, make_mesh("tensor:2"))
      raise SystemExit("not refused")
    except ValueError as error:
      assert "tensor:2 does not divide 1" in str(error) and "linearize its teacher with" in str(error), error
  else:
    assert all(len(layer.retained) <= 2 for layer in made.layers), made.layers
    odd = config.replace(num_heads=6, num_kv_heads=3)
    try:
      linearize(Transformer(odd).init(jax.random.key(0), tokens, method="logits")["params"], odd, start, mesh=mesh)
      raise SystemExit("not refused")
    except ValueError as error:
      assert "tensor:2 does not divide 6 heads and 3 key/value heads" in str(error), error
"""


def test_on_a_mesh():
  """The heads of each size divide by `tensor` where sizes are found on such a mesh; else the mesh is refused."""
  programs.succeeds_on_devices(2, "-c", INSIDE)


def test_the_head_that_looks_up_gets_the_tokens():
  """Of the teacher that copies, layer 0 needs the token before alone, and layer 1 looks for what stood there before."""
  teacher, mesh = copying.teacher(), make_mesh(devices=jax.devices()[:1])
  text = [{"tokens": copying.filler()[at : at + 257][None]} for at in (0, 257, 514)]
  start = Memory(window=8, sinks=1, chunk=8, state_tokens=70, state_dtype="float32")
  lost = []
  for weight in (0.0, 1.0, 2.0):
    with jax.set_mesh(mesh):
      told = dataclasses.replace(start, recall_weight=weight)
      _, config, found = remembered((teacher.params, teacher.config), told, text, mesh, range(2))
    assert config.layers[0].retained[0] <= 8 and config.layers[1].retained[0] >= 88
    lost.append(found["nats_lost"]["one_size"])
  assert lost[0] > 0.01
  # What is lost of recall is added, in the text's unit.
  assert lost[1] > 1.1 * lost[0] and lost[2] - lost[1] == pytest.approx(lost[1] - lost[0], abs=1e-4)
