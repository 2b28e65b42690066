"""Logits that are not finite are no result: evaluation and generation say where, and the programs fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.data.tokenizer import Tokenizer
from supra_jax.evaluation import likelihood as evaluate
from supra_jax.experiments import tiny
from supra_jax.inference.engine import generate_tokens
from supra_jax.inference.lm import LM
from supra_jax.model.finite import NotFiniteError
from supra_jax.model.registry import layers
from supra_jax.storage.model_directory import save_model
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[2]
WINDOW, AT = 600, 530  # AT lies in the second piece that is read


def overflowing(lm: LM) -> tuple[LM, LM, list[int], int]:
  """(model in float16, in float32, a prompt, the token that comes after it), where that token alone overflows float16.

  It alone has something in the first feature, which the first norm makes larger than float16 can be.
  """
  params = jax.tree.map(np.array, lm.params)
  params["embed_tokens"]["embedding"][:, 0] = 0
  params["layers_0"]["input_layernorm"]["weight"][0] = 6e4
  prompt = lm.tokenizer.encode("The name")
  (token,) = generate_tokens(lm.model, params, prompt, max_new_tokens=1)
  assert token not in prompt
  params["embed_tokens"]["embedding"][token, 0] = 20
  narrow, wide = (jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params) for dtype in (np.float16, np.float32))
  return LM(lm.config, narrow, lm.tokenizer), LM(lm.config, wide, lm.tokenizer), prompt, token


@pytest.fixture(scope="module")
def case(random_params):
  """In a model with a cache, a ring and a linear state."""
  config = tiny.tiny_config("supra").replace(layers=layers(("softmax", "supra_window"), window=5, sinks=2))
  files = {"tokenizer.json": tiny.tokenizer_json()}
  return overflowing(LM(config, random_params(config), Tokenizer.from_files(files, config)))


def test_evaluation_says_where(case):
  narrow, _, _, token = case
  tokens = [i for i in np.random.default_rng(0).integers(1, tiny.VOCAB, 3 * WINDOW).tolist() if i != token]
  tokens[WINDOW + AT] = token
  said = (
    rf"The logits after token {WINDOW + AT + 1} of the text \(id {token}\) are not finite; layer 0 is the first whose "
    r"output is not finite\. float16 may be too small for them: try --dtype=float32"
  )
  with pytest.raises(NotFiniteError, match=said):
    evaluate.text_nll(narrow, tokens, sequence_length=WINDOW, batch_size=2)
  with pytest.raises(NotFiniteError, match=rf"Request 1: The logits after token 3 of the text \(id {token}\)"):
    evaluate.loglikelihoods(narrow, [([5, 6], [7]), ([5, 6], [token, 9])])


def test_generation_says_after_which_token(case):
  narrow, wide, prompt, token = case
  tokens = generate_tokens(narrow.model, narrow.params, prompt, max_new_tokens=20)
  assert next(tokens) == token
  with pytest.raises(NotFiniteError, match=rf"The logits after new token 1 \(id {token}\) are not finite\. float16"):
    next(tokens)
  again = generate_tokens(narrow.model, narrow.params, [*prompt, token], max_new_tokens=20)
  with pytest.raises(NotFiniteError, match=rf"after token {len(prompt) + 1} of the text \(id {token}\) .* layer 0 is"):
    next(again)
  # One that nobody asked for is not looked at.
  assert list(generate_tokens(narrow.model, narrow.params, prompt, max_new_tokens=1)) == [token]
  assert len(list(generate_tokens(wide.model, wide.params, prompt, max_new_tokens=20))) == 20


def test_parameters_at_fault(case):
  _, wide, prompt, _ = case
  params = wide.params | {"norm": {"weight": jnp.full_like(wide.params["norm"]["weight"], jnp.inf)}}
  with pytest.raises(NotFiniteError, match=r"token 1 of the text .* are not finite\. They were computed in float32"):
    list(generate_tokens(wide.model, params, prompt, max_new_tokens=3))


def test_programs_fail(case, tmp_path):
  narrow, _, prompt, token = case
  files = {"tokenizer.json": tiny.tokenizer_json()}
  save_model(tmp_path / "f16", config=narrow.config, params=narrow.params, tokenizer_files=files, source={})
  text = tmp_path / "a.jsonl"
  text.write_text(json.dumps({"text": narrow.tokenizer.decode([*prompt, token] * 9)}) + "\n")
  arguments = {
    "evaluate": [f"--input={text}", "--sequence_length=8"],
    "generate": ["--prompt=The name", "--max_new_tokens=12"],
  }
  for name, more in arguments.items():
    command = [f"supra_jax.bin.{name}", f"--checkpoint={tmp_path / 'f16'}", *more]
    if name == "evaluate":  # which nothing else starts
      done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    else:
      done = programs.run(*command)
    assert done.returncode == 1, name
    assert done.stderr.startswith("error: The logits after ") and "try --dtype=float32" in done.stderr, done.stderr
    assert "nan" not in done.stdout
