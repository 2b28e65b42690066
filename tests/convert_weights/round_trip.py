"""A model directory written for others and read back, and what has to be the same then."""

import numpy as np

from convert_weights import hf_to_orbax
from convert_weights.orbax_to_hf import convert
from supra_jax.storage.model_directory import load_model, save_model


def flat(tree, prefix=()):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from flat(value, (*prefix, name))
    else:
      yield (*prefix, name), np.asarray(value)


def assert_same_bits(got, want):
  assert got.keys() == want.keys()
  for name, array in got.items():
    assert (array.dtype, array.shape, array.tobytes()) == (want[name].dtype, want[name].shape, want[name].tobytes()), (
      name
    )


def assert_same_model(got, want):
  assert got.config == want.config
  assert_same_bits(dict(flat(got.params)), dict(flat(want.params)))
  assert got.tokenizer_files.keys() >= want.tokenizer_files.keys()
  # What is written of a tokenizer's settings is for all releases; its ids and all else are the same.
  same = set(want.tokenizer_files) - {"tokenizer_config.json"}
  assert {name: got.tokenizer_files[name] for name in same} == {name: want.tokenizer_files[name] for name in same}


def save(directory, config, params, tokenizer_files=None):
  save_model(directory, config=config, params=params, tokenizer_files=tokenizer_files or {}, source={})
  return directory


def there_and_back(first, directory, **how):
  """Model directory -> export -> model directory."""
  convert(first, directory / "exported", **how)
  hf_to_orbax.convert(directory / "exported", directory / "second")
  return directory / "exported", load_model(directory / "second")
