"""The solve against numpy's least squares; a mesh against one device; a teacher that can be met exactly."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import runs
from supra_jax.core.sharding import make_mesh
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny as tiny_model
from supra_jax.inference.lm import load
from supra_jax.linearization.calibrate import calibrate
from supra_jax.linearization.calibration_text import rows_of_text
from supra_jax.linearization.linearize import linearize, linearize_checkpoint
from supra_jax.linearization.solve import Moments, solve
from supra_jax.linearization.starts import Calibrated, Identity, Random, Window
from supra_jax.model import registry
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.presets import tiny
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model
from tests.support import programs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")


def _moments(a, y):
  a = np.column_stack([a, np.ones(len(a))])
  return Moments(a.T @ a, a.T @ y, np.sum(y * y), len(y))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 20.0, (3.0, 50.0)])
@pytest.mark.parametrize("has_prior", [False, True])
def test_solve_is_least_squares(has_prior, ridge, bias):
  rng = np.random.default_rng(0)
  prior = has_prior * rng.standard_normal((8, 3))
  a, y = rng.standard_normal((200, 8)) * np.repeat([1, 5], 4) + 1, rng.standard_normal((200, 3)) + 2
  kernel, offset, left = solve(_moments(a, y), ridge=ridge, bias=bias, prior=prior)
  # As rows of a larger least squares problem; a free offset is what centring takes away.
  inner, outer = (a - a.mean(0), y - y.mean(0)) if bias else (a, y)
  parts = np.split(inner, np.size(ridge), axis=1)
  sizes = [np.sqrt(r / 200 * np.mean(np.sum(part**2, axis=0))) for r, part in zip(np.ravel(ridge), parts, strict=True)]
  size = np.diag(np.repeat(sizes, 8 // len(sizes)))
  wanted, *_ = np.linalg.lstsq(np.vstack([inner, size]), np.vstack([outer, size @ prior]), rcond=None)
  np.testing.assert_allclose(kernel, wanted, rtol=1e-10)
  if bias:
    np.testing.assert_allclose(offset, y.mean(0) - a.mean(0) @ wanted, rtol=1e-10)
  else:
    assert offset is None
  missed = y - a @ wanted - (0 if offset is None else offset)
  np.testing.assert_allclose(left, np.sum(missed**2) / np.sum(y**2), rtol=1e-10)


def test_dead_features_get_no_weights():
  kernel, offset, left = solve(_moments(np.zeros((20, 3)), np.ones((20, 2))), ridge=4000.0, bias=False)
  assert offset is None and left == 1 and not kernel.any()


TEACHER = tiny("softmax").replace(
  vocab_size=96, layers=registry.layers(("softmax",) * 3), hidden_size=24, num_heads=6, value_head_dim=12
)
SUPRA = SupraConfig(feature_map="per_head")


def _batches(count, rows=8, time=32, **more):
  rng = np.random.default_rng(1)
  return [
    {"tokens": rng.integers(0, TEACHER.vocab_size, (rows, time + 1)).astype(np.int32), **more} for _ in range(count)
  ]


def _calibrated(params, *, batches, mesh="data:1", devices=1, layers=None, window=None, config=TEACHER, **options):
  start = Identity() if window is None else Window(window)
  made = linearize(params, config, start, mixer=SUPRA, layers=layers)
  student, student_config = made.params, made.config
  where = make_mesh(mesh, jax.devices()[:devices])
  with jax.set_mesh(where):
    place = lambda tree: jax.device_put(tree, param_shardings(tree, where))  # noqa: E731
    teacher = place(params), config
    return calibrate(teacher, (place(student), student_config), batches, where, **options), student, student_config


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens):
  return Transformer(config).apply({"params": params}, tokens, method="logits")[0]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("mlp", [False, True])
def test_only_projections_change(random_params, mlp, window):
  params = random_params(TEACHER)
  got, student, _ = _calibrated(params, batches=_batches(2), layers=[0, 2], mlp=mlp, window=window)
  changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), got, student)
  paths = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(changed) if x}
  wanted = ["['self_attn']['o_proj']['kernel']"] + ["['mlp']['down_proj']['kernel']"] * mlp
  wanted += ["['self_attn']['linear_o_proj']['kernel']"] * (window is not None)
  assert paths == {f"['layers_{i}']{name}" for i in (0, 2) for name in wanted}


@pytest.mark.parametrize("already", [0, 1])
def test_a_teacher_that_can_be_met_is_met(random_params, already):
  """Softmax attention that is 0 wants W_o = 0, and then student and teacher are one function; SUPRA layers stay."""
  teacher = TEACHER.replace(layers=(SUPRA,) * already + (registry.layer("softmax"),) * (3 - already))
  params = random_params(teacher)
  for i in range(already, 3):
    kernel = params[f"layers_{i}"]["self_attn"]["o_proj"]["kernel"]
    params[f"layers_{i}"]["self_attn"]["o_proj"] = {"kernel": jnp.zeros_like(kernel)}
  got, _, config = _calibrated(params, batches=_batches(2), config=teacher)
  tokens = _batches(1)[0]["tokens"]
  np.testing.assert_allclose(_logits(got, config, tokens), _logits(params, teacher, tokens), atol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_a_layer_is_what_least_squares_says(random_params, window):
  """The first layer's projections from whole activations, in float64."""
  params, batches = random_params(TEACHER), _batches(3)
  got, student, config = _calibrated(params, batches=batches, ridge=50.0, window=window)
  tokens = np.concatenate([batch["tokens"][:, :-1] for batch in batches])
  seen = {}

  def watch(next_fun, args, kwargs, context):
    result = next_fun(*args, **kwargs)
    name = f"{'.'.join(context.module.path)}.{context.method_name}"
    first = result[0] if isinstance(result, tuple) else result
    # Of a mixer's `outputs` there are several, o_proj's first.
    seen[name] = np.float64(np.concatenate(list(first.values()), axis=2) if isinstance(first, dict) else first)
    return result

  def run(config, params):
    seen.clear()
    with nn.intercept_methods(watch):
      Transformer(config.replace(layers=config.layers[:1])).apply({"params": params}, tokens)
    return {name: x.reshape(tokens.size, -1) for name, x in seen.items() if x.shape[:2] == tokens.shape}

  def solved(features, missing, stream, prior=0.0, ridges=(50.0,)):
    weights = 1 / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + config.norm_eps)
    sizes = np.mean(np.sum((weights * features) ** 2, axis=0).reshape(len(ridges), -1), axis=1)
    rows = np.diag(np.repeat(np.sqrt(np.array(ridges) / tokens.size * sizes), features.shape[1] // len(ridges)))
    a = np.vstack([weights * features, rows])
    y = np.vstack([weights * missing, rows @ (prior + np.zeros((len(rows), missing.shape[1])))])
    return np.linalg.lstsq(a, y, rcond=None)[0]

  teacher, begun = run(TEACHER, params), run(config, student)
  stream = teacher["embed_tokens.__call__"] + teacher["layers_0.self_attn.__call__"]
  old, new = student["layers_0"]["self_attn"], got["layers_0"]["self_attn"]
  names = ["o_proj"] if window is None else ["o_proj", "linear_o_proj"]
  prior = 0.0 if window is None else np.vstack([old[name]["kernel"] for name in names])
  # A quarter of the ridge where the teacher's own projection is the prior.
  ridges = (50.0,) if window is None else (12.5, 50.0)
  wanted = solved(begun["layers_0.self_attn.outputs"], teacher["layers_0.self_attn.__call__"], stream, prior, ridges)
  np.testing.assert_allclose(np.vstack([new[name]["kernel"] for name in names]), wanted, atol=2e-5)

  half = {**student, "layers_0": {**got["layers_0"], "mlp": student["layers_0"]["mlp"]}}
  halfway = run(config, half)
  missing = teacher["layers_0.__call__"] - halfway["layers_0.__call__"]
  more = solved(halfway["layers_0.mlp.hidden"], missing, teacher["layers_0.__call__"])
  down = student["layers_0"]["mlp"]["down_proj"]["kernel"]
  np.testing.assert_allclose(got["layers_0"]["mlp"]["down_proj"]["kernel"], down + more, atol=5e-5)


def test_a_window_comes_nearer(random_params):
  """Layer by layer less of the attention is missed, and what comes out is nearer to the teacher."""
  params, batches, tokens = random_params(TEACHER), _batches(4), _batches(5)[4]["tokens"]
  wanted, missed, distance = _logits(params, TEACHER, tokens), {}, {}
  for window in (None, 8, 16):
    missed[window] = []
    report = lambda layer, layers, share, text, window=window: missed[window].append(share)  # noqa: E731
    got, _, config = _calibrated(params, batches=batches, window=window, ridge=200.0, report=report)
    distance[window] = float(jnp.square(_logits(got, config, tokens) - wanted).mean())
  assert (np.diff([missed[window] for window in (None, 8, 16)], axis=0) < 0).all(), missed
  assert distance[16] < distance[8] < distance[None], distance


INSIDE = """
import jax, numpy as np
from tests.conftest import _random_params
from tests.linearization.test_calibrate import TEACHER, _batches, _calibrated

params, batches = _random_params(TEACHER), _batches(2)
for mesh, window in (("data:2,fsdp:2,tensor:2", None), ("fsdp:8", None), ("data:2,fsdp:2,tensor:2", 5)):
  alone, *_ = _calibrated(params, batches=batches, window=window)
  cut, *_ = _calibrated(params, batches=batches, mesh=mesh, devices=8, window=window)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), cut, alone)
"""


def test_a_mesh_is_one_device():
  programs.succeeds_on_devices(8, "-c", INSIDE)


def test_documents_stay_apart(random_params):
  """Rows of two documents give what the documents alone give."""
  params = random_params(TEACHER)
  both = _batches(1)[0]["tokens"]
  ids = np.repeat([[1, 2]], 8, axis=0).repeat(16, axis=1)
  packed = {"tokens": both, "segment_ids": np.pad(ids, ((0, 0), (0, 1)), mode="edge").astype(np.int32)}
  halves = np.concatenate([both[:, :16], both[:, 16:32]])
  apart = {"tokens": np.pad(halves, ((0, 0), (0, 1)))}
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-4),
    _calibrated(params, batches=[packed])[0],
    _calibrated(params, batches=[apart])[0],
  )


def test_no_more_text_is_read_than_it_takes(tmp_path):
  tokenizer = Tokenizer.from_files({"tokenizer.json": tiny_model.tokenizer_json()}, tiny_model.tiny_config("softmax"))
  documents = [f"{letter} {'word ' * 50}" for letter in "abc"]
  for name in ("one", "two"):
    lines = [json.dumps({"body": f"{name} {document}"}) for document in documents]
    (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "no JSON, and never read"]))
  rows = rows_of_text(f"{tmp_path}/*.jsonl", tokenizer, rows=4, length=20, text_key="body")
  assert rows.shape == (4, 20) and rows.dtype == np.int32
  texts = [tokenizer.decode(row.tolist()) for row in rows]
  assert [text.split()[:2] for text in texts] == [["one", "a"], ["two", "a"], ["one", "b"], ["two", "b"]]
  assert (rows[:, -1] == tokenizer.eos_ids[0]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_nearer_to_its_teacher(tmp_path, packed):
  """As a user has it: from a model directory and text to a model directory that loads and generates."""
  teacher = tiny_model.write_checkpoint(tmp_path / "teacher", "softmax")
  text = str(tiny_model.write_text(tmp_path / "topics.jsonl"))
  start = load(teacher)
  if packed:
    prepare(text, start.tokenizer, tmp_path / "packed", vocab_size=tiny_model.VOCAB, sequence_length=48)
    text = f"{tmp_path}/packed/train"
  how = Calibrated(text, tokens=2000, sequence_length=48, batch_size=4, ridge=100.0)
  reported = []
  linearize_checkpoint(teacher, tmp_path / "calibrated", how, progress=lambda *x: reported.append(x[:2]))
  linearize_checkpoint(teacher, tmp_path / "random", Random())
  assert reported == [(0, 2), (1, 2)]
  tokens = [start.tokenizer.encode(Path(tmp_path / "topics.jsonl").read_text()[-400:])]
  wanted = jax.nn.log_softmax(start(tokens)[0])
  divergence = {}
  for name in ("calibrated", "random"):
    model = load(tmp_path / name)
    got = jax.nn.log_softmax(model(tokens)[0])
    divergence[name] = float((jnp.exp(wanted) * (wanted - got)).sum(-1).mean())
  assert divergence["calibrated"] < 0.9 * divergence["random"], divergence
  calibrated = load(tmp_path / "calibrated")
  assert calibrated.config.mixers == ("supra", "supra") and len(calibrated.generate("The", max_new_tokens=5)) > 0
  assert load_model(tmp_path / "calibrated").source["start"]["tokens"] == 2000
  # Whole batches of four rows of 48; the text has 24 documents, of which none gives more than a row.
  assert load_model(tmp_path / "calibrated").source["calibrated_on"] == (11 if packed else 6) * 4 * 48


# Processes of two devices each; prints nothing.
PROCESS = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Calibrated
from supra_jax.model.registry import layer

text, teacher, output = sys.argv[3:]
start = Calibrated(text, tokens=500, sequence_length=48, batch_size=4, keep_softmax=1, measured_tokens=96)
linearize_checkpoint(teacher, output, start, mixer=layer("supra_window", window=8), mesh="fsdp:2,tensor:2")
"""


def test_two_processes_leave_what_one_does(tmp_path):
  """From directory to directory, new weights, windows and the choice of layers included."""
  teacher = tiny_model.write_checkpoint(tmp_path / "teacher", "softmax", layers=registry.layers(("softmax",) * 3))
  text = tiny_model.write_text(tmp_path / "topics.jsonl")
  how = {"tokens": 500, "sequence_length": 48, "batch_size": 4, "keep_softmax": 1, "measured_tokens": 96}
  mixer = registry.layer("supra_window", window=8)
  config = linearize_checkpoint(teacher, tmp_path / "one", Calibrated(str(text), **how), mixer=mixer).config
  environment = os.environ | runs.devices_environment(2) | {"JAX_PLATFORMS": "cpu"}
  port = str(runs.free_port())
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, port, str(number), str(text), str(teacher), str(tmp_path / "two")],
      cwd=ROOT,
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  said = [process.communicate(timeout=300)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], said
  one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
  assert two.config == one.config == config and config.mixers.count("softmax") == 1
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), two.params, one.params)


def test_too_little_text_is_said(tmp_path):
  teacher = tiny_model.write_checkpoint(tmp_path / "teacher", "softmax")
  (tmp_path / "a.txt").write_text("Little.")
  with pytest.raises(ValueError, match=r"a\.txt has 0 rows of 512 tokens for calibration; wanted at least 8"):
    linearize_checkpoint(teacher, tmp_path / "out", Calibrated(str(tmp_path / "a.txt")))
  assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite(tmp_path, random_params):
  """Are no calibration: nothing is written."""
  config = tiny_model.tiny_config("softmax")
  params = jax.tree.map(np.asarray, random_params(config))
  params["layers_0"]["input_layernorm"]["weight"] = np.full(config.hidden_size, 3e38, np.float32)
  files = {"tokenizer.json": tiny_model.tokenizer_json()}
  save_model(tmp_path / "teacher", config=config, params=params, tokenizer_files=files, source={})
  how = Calibrated(str(tiny_model.write_text(tmp_path / "a.jsonl")), tokens=500, sequence_length=48, batch_size=4)
  with pytest.raises(ValueError, match=r"Layer \d cannot be calibrated: the teacher's activations there are not"):
    linearize_checkpoint(tmp_path / "teacher", tmp_path / "out", how)
  assert not (tmp_path / "out").exists()
