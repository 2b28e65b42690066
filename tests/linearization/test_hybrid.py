"""Divergences against whole hybrids in float64; a layer that matters is found; from command line to checkpoint."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.core.sharding import make_mesh
from supra_jax.data.packing import prepare
from supra_jax.experiments import tiny as tiny_model
from supra_jax.inference.lm import load
from supra_jax.linearization.calibrate import calibrate
from supra_jax.linearization.hybrid import Divergences, choose_softmax_layers, costs, layer_divergences, set_apart
from supra_jax.linearization.linearize import linearize, linearize_checkpoint
from supra_jax.linearization.starts import Calibrated, Identity, Memory
from supra_jax.model import registry
from supra_jax.model.costs import state_bytes
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.presets import tiny
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model
from tests.support import programs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = tiny("softmax").replace(
  vocab_size=96, layers=registry.layers(("softmax",) * 3), hidden_size=24, num_heads=6, value_head_dim=12
)


def _batch(seed=1, documents=False, rows=8, time=16):
  rng = np.random.default_rng(seed)
  batch = {"tokens": rng.integers(0, TEACHER.vocab_size, (rows, time + 1)).astype(np.int32)}
  if documents:
    batch["segment_ids"] = np.sort(rng.integers(1, 4, (rows, time + 1)), axis=1).astype(np.int32)
  return batch


def _measured(params, config, batches, *, layers=None, mesh="data:1", devices=1, report=None):
  """(what is measured on a student, the student's parameters and config)."""
  made = linearize(params, config, Identity(), mixer=SupraConfig("per_head"), layers=layers)
  student, student_config = made.params, made.config
  where = make_mesh(mesh, jax.devices()[:devices])
  with jax.set_mesh(where):
    cut = [jax.device_put(tree, param_shardings(tree, where)) for tree in (params, student)]
    got = layer_divergences((cut[0], config), (cut[1], student_config), batches, where, report=report)
  return got, student, student_config


def _log_probabilities(params, config, tokens, segment_ids):
  inputs = tokens[:, :-1], None if segment_ids is None else segment_ids[:, :-1]
  logits = np.float64(
    Transformer(config).apply({"params": params}, inputs[0], segment_ids=inputs[1], method="logits")[0]
  )
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
  ("documents", "layers", "changes"),
  [
    (False, None, {}),
    (True, [0, 2], {"tie_embeddings": True, "post_embed_norm": True, "norm": "layer_norm", "sliding_window": 5}),
  ],
)
def test_divergences_are_those_of_whole_hybrids(random_params, documents, layers, changes):
  config = TEACHER.replace(**changes)
  params, batches, reported = random_params(config), [_batch(1, documents), _batch(2, documents, rows=4)], []
  got, student, student_config = _measured(params, config, batches, layers=layers, report=lambda *x: reported.append(x))
  layers = [0, 1, 2] if layers is None else layers
  assert list(got.by_layer) == layers
  assert [x[:2] for x in reported] == [(i, len(layers)) for i in layers] * 2
  # Rows of all batches at once, whole logits, the mean over all targets.
  tokens, ids = (
    np.concatenate([b[name] for b in batches]) if name in batches[0] else None for name in ("tokens", "segment_ids")
  )
  counted = np.ones((12, 16)) if ids is None else ids[:, 1:] == ids[:, :-1]
  log_p = _log_probabilities(params, config, tokens, ids)

  def divergence(params, config):
    log_q = _log_probabilities(params, config, tokens, ids)
    return (counted * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum() / counted.sum()

  np.testing.assert_allclose(got.student, divergence(student, student_config), rtol=1e-4)
  for i in layers:
    taken_back = list(student_config.layers)
    taken_back[i] = config.layers[i]
    hybrid = student | {f"layers_{i}": params[f"layers_{i}"]}
    want = divergence(hybrid, student_config.replace(layers=tuple(taken_back)))
    np.testing.assert_allclose(got.by_layer[i], want, rtol=1e-4)
  assert got.tokens == counted.sum()


def test_all_of_a_teacher_taken_back_is_the_teacher(random_params):
  got, *_ = _measured(random_params(TEACHER), TEACHER, [_batch()], layers=[2])
  assert abs(got.by_layer[2]) < 1e-5 < got.student


def test_a_layer_that_matters_is_chosen(random_params):
  """Attention is 0 in all layers but one, so that what the others have lost, calibration gives back."""
  params = random_params(TEACHER)
  for i in (0, 2):
    kernel = params[f"layers_{i}"]["self_attn"]["o_proj"]["kernel"]
    params[f"layers_{i}"]["self_attn"]["o_proj"] = {"kernel": jnp.zeros_like(kernel)}
  mesh = make_mesh("data:1", jax.devices()[:1])
  with jax.set_mesh(mesh):
    made = linearize(params, TEACHER, Identity())
    student = calibrate((params, TEACHER), (made.params, made.config), [_batch(), _batch(2)], mesh, mlp=False)
    got = layer_divergences((params, TEACHER), (student, made.config), [_batch(3)], mesh)
  assert choose_softmax_layers(got, 1) == [1] and got.by_layer[1] < 0.1 * got.student, got


def test_the_least_divergences_are_chosen():
  assert choose_softmax_layers(Divergences(9, 3.0, {1: 0.5, 4: 0.2, 5: 0.9, 7: 0.1}), 3) == [1, 4, 7]


def test_nothing_to_measure_on(random_params):
  batch = _batch()
  batch["segment_ids"] = np.broadcast_to(np.arange(17, dtype=np.int32), (8, 17))
  with pytest.raises(ValueError, match="no batch has a target"):
    _measured(random_params(TEACHER), TEACHER, [batch])


@pytest.mark.parametrize(("tokens", "rows"), [(1, [1]), (16, [1]), (17, [2]), (128, [8]), (129, [8, 1])])
def test_no_more_rows_than_it_takes_are_set_apart(tokens, rows):
  given, mesh = [_batch(1), _batch(2), _batch(3)], make_mesh("data:1", jax.devices()[:1])
  left, apart = set_apart(given, tokens, mesh)
  assert [len(batch["tokens"]) for batch in apart] == rows
  for got, want in zip([*left, *apart], given, strict=True):
    np.testing.assert_array_equal(got["tokens"], want["tokens"][: len(got["tokens"])])
  with pytest.raises(ValueError, match="257 tokens to measure on are all of the text"):
    set_apart(given, 257, mesh)


INSIDE = """
import jax, numpy as np
from tests.conftest import _random_params
from tests.linearization.test_hybrid import TEACHER, _batch, _measured, set_apart, make_mesh

params, batches = _random_params(TEACHER), [_batch(1, True), _batch(2, True)]
alone, *_ = _measured(params, TEACHER, batches)
for mesh in ("data:2,fsdp:2,tensor:2", "data:2,context:2,tensor:2"):
  cut, *_ = _measured(params, TEACHER, batches, mesh=mesh, devices=8)
  got, want = ([x.student, *x.by_layer.values()] for x in (cut, alone))
  np.testing.assert_allclose(got, want, rtol=1e-4)
assert len(set_apart(batches, 1, make_mesh("fsdp:4,tensor:2"))[1][0]["tokens"]) == 4
"""


def test_a_mesh_is_one_device():
  programs.succeeds_on_devices(8, "-c", INSIDE)


def test_a_state_has_a_size():
  config = tiny("supra").replace(layers=registry.layers(("supra", "softmax")), value_head_dim=12)
  linear, token = 4 * 6 * 8 * 12, 2 * 2 * (8 + 12)
  assert state_bytes(config, 0) == linear and state_bytes(config, 7) == linear + 7 * token
  assert state_bytes(config, 7, jnp.float32) == linear + 14 * token
  assert costs(config).startswith("1 RNN layers, 1 softmax layers; at 2,048 tokens 0.2 MiB of state and ")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return tiny_model.write_checkpoint(
    tmp_path_factory.mktemp("hybrid") / "teacher", "softmax", layers=registry.layers(("softmax",) * 4)
  )


@pytest.fixture(scope="module")
def how(tmp_path_factory):
  text = tiny_model.write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")
  return Calibrated(str(text), tokens=500, sequence_length=48, batch_size=4, ridge=100.0)


def _program(*flags):
  return programs.run("supra_jax.bin.linearize", *flags)


def test_from_the_command_line(tmp_path, teacher, how):
  """Two of the three layers named are made RNN layers; which, the table, the record and the model agree on."""
  prepare(how.data, load(teacher).tokenizer, tmp_path / "data", vocab_size=tiny_model.VOCAB, sequence_length=48)
  flags = [f"--checkpoint={teacher}", f"--output={tmp_path}/out", f"--calibration_data={tmp_path}/data/train"]
  flags += ["--method=calibrated"]
  ran = _program(*flags, "--calibration_tokens=512", "--measured_tokens=100", "--layers=0,1,-1", "--keep_softmax=1")
  assert ran.returncode == 0, ran.stderr[-2000:]
  made = load_model(tmp_path / "out")
  kept = made.source["kept_softmax"]
  divergences = {int(layer): x for layer, x in kept["by_layer"].items()}
  assert divergences.keys() == {0, 1, 3} and made.source["layers"] == [i for i in (0, 1, 3) if i not in kept["layers"]]
  assert kept["layers"] == [min(divergences, key=divergences.get)] and kept["tokens"] == 144
  assert made.config.mixers == tuple("softmax" if i in (2, *kept["layers"]) else "supra" for i in range(4))
  read, first, *rows, last = ran.stdout.splitlines()
  assert read.startswith(f"Read 768 tokens of {tmp_path}/data/train. ")
  assert f"on 144 tokens is {kept['student']:.4f}" in first
  assert [row.split()[1:3] for row in rows] == [
    [str(i), f"{divergences[i]:.4f}"] for i in sorted(divergences, key=divergences.get)
  ]
  assert ["stays" in row for row in rows] == [True, False, False]
  assert last == f"{tmp_path / 'out'}: {costs(made.config)}."
  assert len(load(tmp_path / "out").generate("The", max_new_tokens=5)) > 0


def test_what_stays_is_the_teachers_and_the_rest_is_calibrated_anew(tmp_path, teacher, how):
  reported = []
  start = dataclasses.replace(how, keep_softmax=2, measured_tokens=96)
  progress = lambda *x: reported.append(x)  # noqa: E731
  config = linearize_checkpoint(teacher, tmp_path / "out", start, progress=progress).config
  made, start = load_model(tmp_path / "out"), load_model(teacher)
  kept = made.source["kept_softmax"]
  assert kept["layers"] == [i for i, mixer in enumerate(config.mixers) if mixer == "softmax"]
  assert kept["tokens"] == 96 and len(kept["layers"]) == 2
  measured = [x[2] for x in reported if x[3].startswith("KL")]
  np.testing.assert_allclose(measured, list(kept["by_layer"].values()), rtol=1e-6)
  last = max(i for i, mixer in enumerate(config.mixers) if mixer == "supra")
  assert [x[0] for x in reported] == [*range(4), *range(4), *range(last + 1)]
  rest = [i for i in range(4) if i not in kept["layers"]]
  linearize_checkpoint(teacher, tmp_path / "by_hand", how, layers=rest)
  jax.tree.map(np.testing.assert_array_equal, made.params, load_model(tmp_path / "by_hand").params)
  for i in kept["layers"]:
    jax.tree.map(np.testing.assert_array_equal, made.params[f"layers_{i}"], start.params[f"layers_{i}"])


@pytest.mark.parametrize(
  ("keep", "layers", "message"),
  [
    (0, None, "keep_softmax=0 of 4 layers: wanted 1 to 3"),
    (4, None, "keep_softmax=4 of 4 layers: wanted 1 to 3"),
    (2, [1, -1], "keep_softmax=2 of 2 layers: wanted 1 to 1"),
  ],
)
def test_wrong_numbers_are_named(tmp_path, teacher, how, keep, layers, message):
  with pytest.raises(ValueError, match=message):
    linearize_checkpoint(teacher, tmp_path / "out", dataclasses.replace(how, keep_softmax=keep), layers=layers)
  assert not (tmp_path / "out").exists()


def test_the_default_is_a_memory(tmp_path, teacher):
  """As it is typed; tests/linearization/test_budget.py has Python's."""
  command = [sys.executable, "-m", "supra_jax.bin.linearize", f"--checkpoint={teacher}", f"--output={tmp_path}/out"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
  assert ran.returncode == 0, ran.stderr[-2000:]
  read, last = ran.stdout.splitlines()
  assert read.startswith("Read 6,144 tokens of pydoc:topics; --calibration_data reads text of your own. ")
  made = load_model(tmp_path / "out")
  assert made.config.mixers == ("memory",) * 4 and last == f"{tmp_path / 'out'}: {costs(made.config)}."
  assert made.source["start"] == Memory().to_json()


def test_a_window_alone_says_the_method(tmp_path, teacher):
  ran = _program(f"--checkpoint={teacher}", f"--output={tmp_path}/out", "--window=32", "--sinks=2")
  assert ran.returncode == 0, ran.stderr[-2000:]
  made = load_model(tmp_path / "out")
  assert made.config.layers == registry.layers(("supra_window",) * 4, window=32, sinks=2)
  assert made.source["start"] == {"method": "window", "window": 32, "sinks": 2}


def test_lolcats_from_the_command_line(tmp_path, teacher):
  ran = _program(f"--checkpoint={teacher}", f"--output={tmp_path}/out", "--method=lolcats", "--window=9")
  assert ran.returncode == 0, ran.stderr[-2000:]
  made = load_model(tmp_path / "out")
  assert made.config.layers == registry.layers(("lolcats",) * 4, window=9)
  assert made.source["start"] == {"method": "lolcats", "window": 9}
  assert "bytes of state at any length" in ran.stdout
  assert len(load(tmp_path / "out").generate("The", max_new_tokens=20)) > 0


@pytest.mark.parametrize(
  ("method", "flag", "applies"),
  [
    ("random", "keep_softmax=1", "calibrated"),
    ("calibrated", "window=16", "memory or window or lolcats"),
    ("window", "seed=1", "memory or calibrated or random"),
    ("identity", "mesh=fsdp:1", "memory or calibrated"),
    ("lolcats", "decay=none", "window or calibrated or identity or random"),
  ],
)
def test_a_flag_of_another_method_is_refused(tmp_path, teacher, method, flag, applies):
  ran = _program(f"--checkpoint={teacher}", f"--output={tmp_path}/out", f"--method={method}", f"--{flag}")
  name = flag.partition("=")[0]
  assert ran.returncode == 1
  assert ran.stderr == f"error: --{name} does not apply to --method={method}, but to --method={applies}.\n"


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--method=calibrated", "--measured_tokens=9"], "--measured_tokens does nothing without --keep_softmax."),
    (["--layers="], "--layers=: wanted whole numbers, as in 0,1,-1."),
    (
      ["--method=window", "--decay=none", "--decay_start=0.5"],
      "--decay_start does not apply to --decay=none, but to --decay=lightning.",
    ),
    (["--layers=0,a"], "--layers=0,a: wanted whole numbers, as in 0,1,-1."),
  ],
)
def test_flags_that_say_nothing_are_refused(tmp_path, teacher, flags, said):
  ran = _program(f"--checkpoint={teacher}", f"--output={tmp_path}/out", *flags)
  assert ran.returncode == 1 and ran.stderr == f"error: {said}\n"


def test_a_damaged_tokenizer_is_not_passed_on(tmp_path, teacher):
  shutil.copytree(teacher, tmp_path / "cut")
  path = tmp_path / "cut" / "tokenizer.json"
  path.write_bytes(path.read_bytes()[:200])
  ran = _program(f"--checkpoint={tmp_path}/cut", f"--output={tmp_path}/out")
  assert ran.returncode == 1 and ran.stderr.startswith(f"error: {tmp_path}/cut: tokenizer.json"), ran.stderr
  assert not (tmp_path / "out").exists()
