"""Under jax_enable_x64 a model is the same model: its state has the same types, and its numbers are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.experiments import tiny
from supra_jax.inference.engine import generate_tokens
from supra_jax.model.registry import layers

ROOT = Path(__file__).resolve().parents[2]


def results(directory: Path) -> dict:
  """What a model says of padded rows of documents, and what it writes."""
  jax.config.update("jax_disable_most_optimizations", True)
  lm = supra_jax.load(directory)
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 20))
  logits, state = lm(tokens, lengths=np.array([20, 13]), segment_ids=np.arange(20)[None].repeat(2, 0) // 8)
  types = [*jax.tree.leaves(state.layers), state.position, state.cached, state.segment, logits]
  return {
    "types": [str(x.dtype) for x in types],
    "position": state.position.tolist(),
    "logits": np.asarray(logits[:, :13], np.float64).tolist(),
    "tokens": list(generate_tokens(lm.model, lm.params, [5, 6], max_new_tokens=12)),
  }


@pytest.mark.usefixtures("quick_compilation")
def test_a_child_process_with_x64(tmp_path):
  model = tiny.write_checkpoint(tmp_path / "model", "supra", layers=layers(("softmax", "supra_window"), sinks=0))
  command = [sys.executable, "-m", "tests.model.test_x64", str(model)]
  environment = os.environ | {"JAX_ENABLE_X64": "1"}
  child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
  usual = results(model)
  wide = json.loads(child.communicate()[0])
  assert child.returncode == 0
  assert wide["types"] == usual["types"] == [*["float32"] * 5, *["int32"] * 3, "float32"]
  assert (wide["position"], wide["tokens"]) == (usual["position"], usual["tokens"])
  np.testing.assert_allclose(wide["logits"], usual["logits"], atol=1e-4)


if __name__ == "__main__":
  assert jax.config.jax_enable_x64
  print(json.dumps(results(Path(sys.argv[1]))))
