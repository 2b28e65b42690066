"""One run on one device, on meshes of eight, in several processes: the same losses, each array cut as it should be."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks import runs
from benchmarks.runs import losses, make_config
from supra_jax.experiments import tiny
from supra_jax.model.adapters import AdapterConfig
from supra_jax.training.loop import train

STEPS, BATCH = 20, 16
# float32, and Adam's first steps at 1e-3 make little of a lot: what was measured is 3e-6.
CLOSE = 1e-5
CUBE = "data:2,fsdp:2,tensor:2"


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
  """The same for the processes that are started: nearly all of their time is compilation."""
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  yield
  del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
  return tiny.write_checkpoint(tmp_path_factory.mktemp("start") / "model", "supra")


@pytest.fixture(scope="module")
def configured(start, tmp_path_factory) -> Callable:
  text = tiny.write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")

  def make(**changes):
    optimizer = {"learning_rate": 1e-3, "end_learning_rate": 1e-4}
    return make_config(start, text, num_steps=STEPS, batch_size=BATCH, save_every=10, optimizer=optimizer, **changes)

  return make


@pytest.fixture(scope="module")
def one_device(configured, tmp_path_factory) -> dict[int, float]:
  workdir = tmp_path_factory.mktemp("one") / "run"
  train(configured(mesh="fsdp:1"), workdir)
  return losses(workdir)


# Name -> (processes, devices of each, what the config changes).
RUNS: Mapping[str, tuple[int, int, dict]] = {
  "two processes": (2, 1, {}),
  "four processes": (4, 1, {"mesh": "data:2,fsdp:2"}),
  "data": (1, 8, {"mesh": "data:8"}),
  "fsdp": (1, 8, {"mesh": "fsdp:8", "microbatches": 2}),
  "cube": (1, 8, {"mesh": CUBE}),
  "context": (1, 8, {"mesh": "fsdp:2,context:4", "microbatches": 2}),
  "bfloat16": (1, 8, {"mesh": CUBE, "dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def done(configured, tmp_path_factory) -> dict[str, Path]:
  """The workdir of each of RUNS, two of which run at a time."""
  directory = tmp_path_factory.mktemp("runs")

  def go(name: str) -> Path:
    processes, devices, changes = RUNS[name]
    workdir = directory / name.replace(" ", "_")
    runs.Run(configured(**changes), workdir, processes=processes, devices=devices).finish()
    return workdir

  with ThreadPoolExecutor(2) as pool:
    return dict(zip(RUNS, pool.map(go, RUNS), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_device(name, done, one_device):
  close = 0.05 if name == "bfloat16" else CLOSE
  assert losses(done[name]) == pytest.approx(one_device, rel=0, abs=close)
  assert runs.positions(done[name]) == {10: 10 * BATCH, 20: 20 * BATCH}


@pytest.mark.parametrize("devices", [1, 8])
def test_another_mesh_goes_on_with_what_two_processes_began(devices, configured, done, one_device, tmp_path):
  # Every row once: what comes after the 160 rows of ten steps is the same, in losses and in count.
  workdir = shutil.copytree(done["two processes"], tmp_path / "run")
  shutil.rmtree(workdir / "training" / "20")
  shutil.rmtree(workdir / "checkpoint")
  if devices == 1:
    train(configured(mesh="fsdp:1"), workdir)
  else:
    runs.Run(configured(mesh=CUBE, microbatches=2), workdir, devices=8).finish()
  before = losses(done["two processes"])
  assert {s: x for s, x in losses(workdir).items() if s <= 10} == {s: x for s, x in before.items() if s <= 10}
  assert losses(workdir) == pytest.approx(one_device, rel=0, abs=CLOSE)
  assert runs.positions(workdir) == {10: 10 * BATCH, 20: 20 * BATCH}
  assert (workdir / "checkpoint").exists()


def test_all_stages_on_a_mesh_are_what_one_device_makes_of_them(configured, tmp_path):
  teacher = tiny.write_checkpoint(tmp_path / "teacher", "softmax", seed=1)
  stages = {"transfer_steps": 2, "distill_hidden": 0.5, "adapters": AdapterConfig(rank=2)}
  config = dataclasses.replace(configured(mesh="fsdp:1", distill_from=str(teacher)), num_steps=4, **stages)
  train(config, tmp_path / "one")
  cut = dataclasses.replace(config, mesh=CUBE, microbatches=2)
  runs.Run(cut, tmp_path / "cut", devices=8).finish()
  assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=0, abs=CLOSE)


# Run where there are eight devices; prints what the tests below look at.
INSIDE = """
import json, re, sys
import jax, jax.numpy as jnp
from supra_jax.storage.model_directory import load_model
from supra_jax.core.sharding import batch_sharding, make_mesh
from supra_jax.model.placement import param_shardings
from supra_jax.training.config import TrainConfig
from supra_jax.training.setup import make_train_step

config = TrainConfig.from_mapping(json.loads(sys.argv[1]))
mesh = make_mesh(config.mesh)
with jax.set_mesh(mesh):
  stored = load_model(config.init_checkpoint, shardings=lambda shapes: param_shardings(shapes, mesh))
  step = make_train_step(config, stored.config)
  shapes = step.state_shapes(mesh)
  tokens = jax.ShapeDtypeStruct((1, config.batch_size, 65), jnp.int32, sharding=batch_sharding(mesh, leading=1))
  compiled = step.compiled(jax.tree.map(lambda x: x.sharding, shapes)).lower(shapes, {"tokens": tokens}).compile()

moments, places = jax.tree.leaves(shapes.opt_state), jax.tree.leaves(compiled.output_shardings[0].opt_state)
lines = [line for line in compiled.as_text().splitlines() if re.search(r" all-gather(-start)?\\(", line)]
loaded = jax.tree.leaves(stored.params)
print(json.dumps({
  "state": sum(x.size * 4 for x in jax.tree.leaves(shapes)),
  "batch": config.batch_size * 65 * 4,
  "arguments": compiled.memory_analysis().argument_size_in_bytes,
  "cut": [[x.shape, place.shard_shape(x.shape)] for x, place in zip(moments, places, strict=True)],
  "gathered": [[int(n) for n in d.split(",")] for line in lines for d in re.findall(r"f32\\[([0-9,]+)\\]", line)],
  "loaded": [[x.nbytes, [shard.data.nbytes for shard in x.addressable_shards]] for x in loaded if x.ndim > 1],
}))
"""


@pytest.fixture(scope="module")
def inside(configured) -> dict:
  config = json.dumps(dataclasses.asdict(configured(mesh="fsdp:8")))
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  command = [sys.executable, "-c", INSIDE, config]
  ran = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  return json.loads(ran.stdout)


def test_the_compiled_step_keeps_its_state_in_shards(inside):
  # Gains and biases, a hundredth of this model, are whole on each device.
  assert inside["arguments"] < (inside["state"] + inside["batch"]) / 8 * 1.05
  kernels = [(shape, shard) for shape, shard in inside["cut"] if np.prod(shape) > 1000]
  assert len(kernels) > 10
  assert all(np.prod(shape) == 8 * np.prod(shard) for shape, shard in kernels)


def test_no_stack_of_layers_is_gathered(inside):
  # A layer's parameters are, when it runs; moments and gradients lie in stacks, and what has no layers is as large.
  stacks = [shape for shape, _ in inside["cut"] if len(shape) == 3 and shape[0] == 2]
  assert stacks and inside["gathered"]
  assert not [shape for shape in inside["gathered"] if shape in stacks]
  # The two tables: once to be used, and once in the backward pass.
  for table in ([320, 48], [48, 320]):
    assert inside["gathered"].count(table) <= 2


def test_a_checkpoint_is_loaded_in_shards(inside):
  for whole, shards in inside["loaded"]:
    assert len(shards) == 8 and (set(shards) == {whole // 8} or whole < 1000)
  assert sum(whole for whole, _ in inside["loaded"]) > 260_000
