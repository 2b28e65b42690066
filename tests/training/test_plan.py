"""Plans held to sums worked out by hand, on meshes of eight devices that a process of its own pretends to have."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from supra_jax.core.amounts import parse_bytes
from supra_jax.core.sharding import make_mesh, parse_mesh
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.model import presets
from supra_jax.model.costs import train_flops_per_token
from supra_jax.model.shapes import parameter_shapes
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model_without_params
from supra_jax.training import plan as planning
from supra_jax.training.compiled import Memory, Traffic
from supra_jax.training.config import TrainConfig
from supra_jax.training.setup import row_leaves
from tests.model.test_flops import products
from tests.support import programs

# What a program takes is settled before the passes that this leaves out.
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")
# Recipe and mesh.
CASES = (("mistral_7b_supra", "fsdp:8"), ("llama2_7b_supra", "fsdp:4,tensor:2"))
# Of both; where there are two numbers, Mistral's and Llama's.
VOCAB, WIDTH, HEADS, KEY, LAYERS = 32000, 4096, 32, 128, 32
KV_HEADS, FFN = (8, 32), (14336, 11008)


def recipe(name, **changes):
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return TrainConfig.from_mapping(module.get_config().to_dict() | changes)


def main() -> None:
  """Prints the figures of the plans of all cases as JSON."""
  print(json.dumps([planned(*case) for case in CASES]))


def planned(name: str, mesh: str) -> dict[str, Any]:
  config = recipe(name)
  made = planning.plan(config, planning.planned_model(config), planning.planned_mesh(mesh))
  figures = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name != "config"}
  figures["memory"] = dataclasses.asdict(made.memory)
  figures["traffic"] = {kind: traffic.total_bytes for kind, traffic in made.traffic.items()}
  return figures


def child(*command, **variables):
  # How many devices there are is for the plan to say.
  xla_flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  return subprocess.run(
    [sys.executable, "-m", *command],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu", **variables},
    capture_output=True,
    text=True,
    check=False,
  )


@functools.cache
def all_figures():
  done = child("tests.training.test_plan")
  assert done.returncode == 0, done.stderr
  assert "Involuntary full rematerialization" not in done.stderr
  return json.loads(done.stdout)


def figures(case):
  return all_figures()[case]


def layer_matrices(case):
  """Parameters of a layer that are cut over all eight devices."""
  groups, ffn = KV_HEADS[case], FFN[case]
  projections = 2 * WIDTH * HEADS * KEY + 2 * WIDTH * groups * KEY
  # Llama's queries and keys share their feature map.
  feature_maps = (HEADS * KEY) ** 2 + ((groups * KEY) ** 2 if groups < HEADS else 0)
  return projections + 3 * WIDTH * ffn + feature_maps


def vectors(case):
  """Gains and biases, whole on every device: two norms and the feature maps' biases a layer, and the last norm."""
  groups = KV_HEADS[case]
  return LAYERS * (2 * WIDTH + HEADS * KEY + (groups * KEY if groups < HEADS else 0)) + WIDTH


def parameters_a_device(case):
  return (2 * VOCAB * WIDTH + LAYERS * layer_matrices(case)) // 8 + vectors(case)


@pytest.mark.parametrize("case", range(2), ids=[mesh for _, mesh in CASES])
class TestLargeModels:
  def test_state_of_a_device_is_the_sum_by_hand(self, case):
    made, parameters = figures(case), parameters_a_device(case)
    assert made["parameters"] == 2 * VOCAB * WIDTH + LAYERS * layer_matrices(case) + vectors(case)
    assert made["trainable"] == made["parameters"]
    assert made["parameter_bytes"] == 4 * parameters
    assert made["optimizer_bytes"] == 2 * 4 * parameters + 4  # two moments and Adam's counter
    assert made["gradient_bytes"] == 2 * 4 * parameters

  def test_state_and_batch_are_the_arguments_of_the_program(self, case):
    made = figures(case)
    batch = 1024 // (8, 4)[case] * 2049 * 4
    assert made["batch_bytes"] == batch
    state = made["parameter_bytes"] + made["optimizer_bytes"] + 3 * 4  # and three counters
    assert made["memory"]["arguments"] == state + batch
    assert made["memory"]["aliased"] == state

  def test_fits(self, case):
    memory = Memory(**figures(case)["memory"])
    assert figures(case)["gradient_bytes"] < memory.temporaries
    assert memory.peak < 80e9


def test_weights_move_twice_a_microbatch_and_gradients_once():
  traffic, microbatches = figures(0)["traffic"], 16
  tables, layers = 4 * 2 * VOCAB * WIDTH, 4 * LAYERS * layer_matrices(0)
  # For the forward pass, and once for all that the backward pass does. The tables, which the forward pass alone reads,
  # are gathered before the first microbatch.
  assert traffic["all-gather"] == pytest.approx(microbatches * 2 * layers + tables, rel=1e-3)
  # Once a microbatch, the unembedding too, though its gradient is made in chunks of tokens.
  assert traffic["all-reduce"] == pytest.approx(microbatches * (layers + tables), rel=1e-3)


def test_saved_products_are_not_computed_again():
  model = presets.tiny().replace(intermediate_size=512)
  params = parameter_shapes(Transformer(model, stacked=True))

  def flops(remat):
    transformer = Transformer(model, stacked=True, remat=remat)
    total = lambda params: transformer.apply({"params": params}, jnp.zeros((2, 16), jnp.int32))[0].sum()  # noqa: E731
    return products(jax.make_jaxpr(jax.grad(total))(params).jaxpr)

  # But those of attention, which are no products with parameters.
  assert 0 < flops("matmuls") - flops("none") < 0.1 * (flops("block") - flops("none"))


def test_a_transformer_has_nothing_new():
  made = planning.plan(recipe("tiny", microbatches=1), presets.tiny("softmax"), make_mesh("fsdp:1", jax.devices()[:1]))
  assert (made.new, made.traffic) == (0, {})
  assert "collectives" not in planning.render(made)


def test_a_teacher_is_counted():
  mesh, model = make_mesh("fsdp:1", jax.devices()[:1]), presets.tiny()
  alone = planning.plan(recipe("tiny", microbatches=1), model, mesh)
  config = recipe("tiny", microbatches=1, distill_from="none/yet", dtype="bfloat16")
  teacher = planning.planned_teacher(config)
  assert teacher == presets.tiny("softmax") and planning.planned_teacher(recipe("tiny")) is None
  made = planning.plan(config, model, mesh, teacher)
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(parameter_shapes(Transformer(teacher))))
  assert (alone.teacher_bytes, made.teacher_bytes) == (0, 2 * parameters)
  extra = made.flops_per_token - alone.flops_per_token
  assert extra == pytest.approx(train_flops_per_token(teacher, config.data.sequence_length) / 3)
  with pytest.raises(ValueError, match=r"distill_from='none/yet': wanted the config of that transformer too"):
    planning.plan(config, model, mesh)
  assert "  teacher " in planning.render(made) and "  teacher " not in planning.render(alone)
  assert "and the teacher." in planning.verdict(made, 1)


class TestRecipes:
  @pytest.mark.parametrize("name", RECIPES)
  def test_opens(self, name):
    config = recipe(name)
    assert (config.preset or name.startswith("demo")) and config.preset in ("", *presets.PRESETS)

  @pytest.mark.parametrize(
    ("name", "rate"),
    [("mistral_7b_supra", 3e-5), ("mistral_7b_supra_8k", 3e-5), ("llama2_7b_supra", 3e-5), ("supra_1b", 3e-4)],
  )
  def test_is_the_papers(self, name, rate):
    config, optimizer = recipe(name), recipe(name).optimizer
    assert (optimizer.learning_rate, optimizer.end_learning_rate, optimizer.warmup_steps) == (rate, 1e-5, 1000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert config.tokens_a_step == 2**21 and config.data.sequence_length == (8192 if name.endswith("8k") else 2048)
    assert (config.dtype, config.data.documents, optimizer.z_loss) == ("bfloat16", "join", 1e-4)
    tokens = 100e9 if name == "supra_1b" else 20e9
    assert config.tokens_a_step * config.num_steps == pytest.approx(tokens, rel=1e-3)


class TestPlannedModel:
  def test_preset(self):
    assert planning.planned_model(recipe("mistral_7b_supra")) == presets.mistral_7b("supra")
    assert planning.planned_model(recipe("mistral_7b_supra"), "tiny") == presets.tiny("supra")

  def test_checkpoint_goes_before_the_recipes_preset(self, tmp_path):
    there = tiny.write_checkpoint(tmp_path / "model", "softmax")
    model = load_model_without_params(there).config
    assert model != presets.tiny("softmax")
    assert planning.planned_model(recipe("tiny", init_checkpoint=str(there))) == model
    with pytest.raises(ValueError, match="mixer='supra' is for presets: the layers of init_checkpoint="):
      planning.planned_model(recipe("tiny", init_checkpoint=str(there)), mixer="supra")
    # Parameters that a run would refuse.
    (there / "config.json").write_text(model.replace(intermediate_size=model.intermediate_size + 1).to_json())
    with pytest.raises(ValueError, match=r"model/params: The parameters are not those of the model"):
      planning.planned_model(recipe("tiny", init_checkpoint=str(there)))

  def test_nothing_to_go_by(self):
    with pytest.raises(ValueError, match=r"init_checkpoint='runs/no'.*preset='big' is none of .*mistral_7b"):
      planning.planned_model(recipe("tiny", init_checkpoint="runs/no", preset="big"))


def test_packed_data_say_how_they_are_packed(tmp_path):
  """Documents kept apart have a second array a row, whatever the recipe says; another length is refused as in train."""
  text = tiny.write_text(tmp_path / "text.jsonl")
  tokenizer = load_model_without_params(tiny.write_checkpoint(tmp_path / "model", "supra"))
  encoder = Tokenizer.from_files(tokenizer.tokenizer_files, tokenizer.config)
  sizes = {"vocab_size": tokenizer.config.vocab_size, "sequence_length": 64, "heldout_every": 6, "workers": 0}
  prepare(str(text), encoder, tmp_path / "packed", documents="separate", **sizes)
  mesh, model = make_mesh("fsdp:1", jax.devices()[:1]), tokenizer.config
  data = {"input": "", "sources": str(tmp_path / "packed/train"), "heldout": str(tmp_path / "packed/heldout")}
  config = recipe("tiny", microbatches=1)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
  assert planning.plan(config, model, mesh).batch_bytes == 2 * 4 * config.batch_size * 65
  absent = dataclasses.replace(config, data=dataclasses.replace(config.data, sources="not/yet", heldout="not/yet"))
  assert row_leaves(absent.data, model.vocab_size) == ("tokens",)
  longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=128))
  with pytest.raises(ValueError, match=r"packed/train does not fit: its sequence_length is 64, not 128"):
    planning.plan(longer, model, mesh)


class TestOutput:
  def test_program(self):
    done = child(
      "supra_jax.bin.plan", "--config=configs/tiny.py", "--mesh=data:2,fsdp:2", "--device_memory=1GB", "--model=tiny"
    )
    assert done.returncode == 0, done.stderr
    table, note = done.stdout.split("\n\nCompiled for CPU devices")
    assert re.fullmatch(TABLE, table), table
    assert "temporaries of an accelerator's compiler will differ" in note

  @pytest.mark.parametrize(
    ("flags", "message"),
    [
      ((), "error: Neither --mesh nor the recipe says what to plan for: wanted --mesh=fsdp:8, say.\n"),
      (("--mesh=fsdp:2", "--device_memory=80"), "error: --device_memory=80: wanted a number and one of TB, .*\n"),
    ],
  )
  def test_bad_input(self, flags, message):
    done = programs.run("supra_jax.bin.plan", f"--config={ROOT / 'configs' / 'tiny.py'}", *flags)
    assert done.returncode == 1
    assert re.fullmatch(message, done.stderr)

  def test_a_batch_that_cannot_be_cut(self, monkeypatch):
    # This process has not as many devices as the mesh wants, and none is needed to tell.
    shape = parse_mesh("fsdp:3", 3)
    monkeypatch.setattr(planning, "planned_mesh", lambda _: AbstractMesh(tuple(shape.values()), tuple(shape)))
    done = programs.run("supra_jax.bin.plan", f"--config={ROOT / 'configs' / 'tiny.py'}", "--mesh=fsdp:3")
    wanted = r"error: batch_size=8 in microbatches=2 parts of 4 rows cannot be cut over the 3 shards .*\n"
    assert done.returncode == 1 and re.fullmatch(wanted, done.stderr)

  def test_verdict(self):
    made = handmade(recipe("mistral_7b_supra"))
    assert planning.verdict(made, parse_bytes("80GB")) == "fits: 39.00 GB of 80.00 GB to spare."
    assert planning.verdict(made, parse_bytes("40GB")) == (
      "does not fit: 1.00 GB more than 40.00 GB. microbatches up to 128, with 1 row a device, shrink all of the "
      "temporaries but the gradients; more devices on fsdp share the 20.00 GB of parameters, optimizer state and "
      "gradients."
    )
    worst = dataclasses.replace(made, config=recipe("mistral_7b_supra", remat="matmuls", microbatches=128), rows=1)
    assert planning.verdict(worst, 0).startswith("does not fit: 41.00 GB more than 0.00 B. remat=block keeps")
    assert "microbatches" not in planning.verdict(worst, 0)
    assert "not known" in planning.verdict(dataclasses.replace(made, memory=None), 1)

  def test_what_is_not_known(self):
    made = handmade(recipe("mistral_7b_supra"))
    assert "  all-gather                      12  f32 4.00 GB, bf16 8.00 GB, not known exactly" in planning.render(made)
    assert "peak" not in planning.render(dataclasses.replace(made, memory=None))


def handmade(config):
  giga = 10**9
  return planning.Plan(
    config=config,
    mesh={"data": 1, "fsdp": 8, "tensor": 1},
    platform="cpu",
    seconds=1.0,
    parameters=giga,
    trainable=giga,
    new=0,
    parameter_bytes=4 * giga,
    optimizer_bytes=8 * giga,
    teacher_bytes=0,
    batch_bytes=0,
    gradient_bytes=8 * giga,
    input_bytes=giga,
    memory=Memory(arguments=12 * giga, outputs=12 * giga, aliased=12 * giga, temporaries=29 * giga),
    traffic={"all-gather": Traffic(12, {"f32": 4 * giga, "bf16": 8 * giga}, exact=False)},
    flops_per_token=1.0,
    rows=8,
  )


TABLE = r"""mesh                   data:2,fsdp:2  compiled for cpu in \d+ s
parameters                    45,520  45,520 train, 5,248 are new
tokens a step                    512  2 x 1 rows a device
steps                             20  10,240 tokens
work a token            252\.19 kFLOP  129\.12 MFLOP a step

bytes a device
  parameters                91\.78 kB  float32
  optimizer state          183\.56 kB
  batch                     520\.00 B
  temporaries         +[\d.]+ .B  gradients 183\.55 kB, inputs of layers 24\.58 kB, layers at work, logits
  peak                +[\d.]+ .B

collectives a step                    bytes a device
  all-gather          +\d+  f32 [\d.]+ kB
  all-reduce          +\d+  f32 [\d.]+ kB

fits: 99\d\.\d\d MB of 1\.00 GB to spare\."""


if __name__ == "__main__":
  main()
