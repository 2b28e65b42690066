"""A model over several devices, and in fewer bits: the same texts, and states that go from one to the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supra_jax
from benchmarks.runs import devices_environment
from supra_jax.evaluation.perplexity import text_loss
from supra_jax.experiments import tiny
from supra_jax.inference import decode
from supra_jax.inference.sampling import Draws, Sampling
from supra_jax.model.placement import placed
from supra_jax.model.registry import layers

pytestmark = pytest.mark.usefixtures("quick_compilation")
MESHES = ["data:2,fsdp:2"]
PROMPTS = ["The name", "A", "Once upon a time there was", "x" * 40, "In the beginning"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  mixed = layers(("softmax", "supra_window"), window=5, sinks=2)
  return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", layers=mixed)


@pytest.fixture(scope="module")
def alone(directory):
  return supra_jax.load(directory)


def test_over_meshes(directory):
  """In a process with four devices."""
  environment = os.environ | devices_environment(4) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  command = [sys.executable, "-m", "tests.inference.test_devices", str(directory)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def main(directory):
  alone = supra_jax.load(directory)
  for mesh in MESHES:
    with tempfile.TemporaryDirectory() as scratch:
      _over_a_mesh(mesh, directory, alone, Path(scratch))
  _decoding_moves_no_parameters(directory)
  for mesh in ("context:2", "fsdp:64", "fsdp:3", "tensor:4", "rows:2", "fsdp"):
    with pytest.raises(ValueError, match=r"mesh|does not divide"):
      supra_jax.load(directory, mesh=mesh)
  tokens = np.array([alone.tokenizer.encode("The name of the rose")])
  small, cut = (supra_jax.load(directory, quantize="int8", mesh=mesh) for mesh in (None, "fsdp:2,tensor:2"))
  np.testing.assert_allclose(cut(tokens)[0], small(tokens)[0], atol=1e-4)


def _over_a_mesh(mesh, directory, alone, tmp_path):
  cut = supra_jax.load(directory, mesh=mesh)
  kernel = cut.params["layers_0"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.size * ("fsdp" in mesh) * 2 ** ("tensor" in mesh) <= kernel.size
  assert cut.generate(PROMPTS, max_new_tokens=12, rows=3) == alone.generate(PROMPTS, max_new_tokens=12, rows=3)
  tokens = np.array([cut.tokenizer.encode("The name of the rose")])
  np.testing.assert_allclose(cut(tokens)[0], alone(tokens)[0], atol=1e-4)
  for how in ({"sequence_length": 16, "stride": 5, "batch_size": 3}, {"sequence_length": 0}):
    losses = [text_loss(lm, range(40), **how).nll for lm in (cut, alone)]
    np.testing.assert_allclose(*losses, atol=1e-4)
  # A state of one reads on in the other, in memory and from a file.
  cut.read("In the beginning").save(tmp_path / "cut")
  alone.read("In the beginning").save(tmp_path / "alone")
  want = alone.generate([" was", " of"], state=alone.read("In the beginning"), max_new_tokens=8)
  for lm, other in ((cut, alone), (alone, cut)):
    for state in (other.read("In the beginning"), *map(supra_jax.load_state, (tmp_path / "cut", tmp_path / "alone"))):
      assert lm.generate([" was", " of"], state=state, max_new_tokens=8) == want
      assert lm.read(" was", state).tokens[0].size > state.tokens[0].size


def _decoding_moves_no_parameters(directory):
  """Over fsdp each step adds up activations; no parameter is gathered."""
  lm = supra_jax.load(directory, mesh="fsdp:2")
  state = placed(lm.model.init_state(4, 64), lm.config, lm.mesh)
  draws = Draws.of([Sampling()] * 4, [()] * 4, lm.config.vocab_size)
  token = jnp.zeros(4, jnp.int32)
  with jax.set_mesh(lm.mesh):
    made = decode.decode_steps.lower(lm.model, 1, lm.params, token, state, draws, np.False_, True).compile().as_text()
  assert "all-reduce" in made
  smallest = min(x.size for path, x in jax.tree.leaves_with_path(lm.params) if path[-1].key == "kernel")
  gathered = [line for line in made.splitlines() if " all-gather(" in line]
  sizes = [int(np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",") if n])) for line in gathered]
  assert max(sizes, default=0) < smallest, gathered


def test_int8(directory, alone):
  narrow = supra_jax.load(directory, "bfloat16")
  small = supra_jax.load(directory, "bfloat16", quantize="int8")
  bytes_of = lambda lm: sum(x.nbytes for x in jax.tree.leaves(lm.params))  # noqa: E731
  assert bytes_of(small) < 0.62 * bytes_of(narrow)  # matrices of this model are narrow, and each output has a scale
  tokens = np.array([small.tokenizer.encode("The name of the rose")])
  want, got = np.asarray(alone(tokens)[0]), np.asarray(supra_jax.load(directory, quantize="int8")(tokens)[0])
  assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()
  assert len(small.generate(PROMPTS, max_new_tokens=5)) == len(PROMPTS)
  with pytest.raises(ValueError, match="quantize='int4'"):
    supra_jax.load(directory, quantize="int4")


if __name__ == "__main__":
  main(Path(sys.argv[1]))
