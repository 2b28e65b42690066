"""An export in transformers, what it reads and what it passes on."""

import numpy as np
import transformers

from convert_weights.orbax_to_hf import convert
from supra_jax.storage.model_directory import save_model


def load(directory, **kwargs):
  """The model that transformers makes of an export."""
  return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **kwargs).eval()


def exported(config, params, directory):
  """The same, of an export of ours to directory / "hf"."""
  save_model(directory / "orbax", config=config, params=params, tokenizer_files={}, source={})
  convert(directory / "orbax", directory / "hf")
  return load(directory / "hf")


def tokens_of(config, batch=2, length=150, seed=0):
  return np.random.default_rng(seed).integers(3, config.vocab_size, (batch, length))


def close(got, want, tol=1e-4):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tol)


def carried(output):
  """What is passed on, by the first of its names that this release of transformers knows."""
  name = next(name for name in ("cache", "past_key_values") if name in output)
  return {name: output[name]}
