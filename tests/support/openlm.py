"""The reference's tiny checkpoints, converted, and our parameters under the reference's names."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np

from convert_weights import names
from convert_weights.hf_to_orbax import convert
from supra_jax.model.config import ModelConfig
from supra_jax.storage.model_directory import load_model

GOLDEN = Path(__file__).parents[1] / "golden" / "openlm"


def load(case: str) -> tuple[ModelConfig, dict]:
  """(config, params) of a case, by way of the converter."""
  with tempfile.TemporaryDirectory() as directory:
    convert(GOLDEN / case, Path(directory) / "model")
    model = load_model(Path(directory) / "model")
  return model.config, jax.tree.map(np.asarray, model.params)


def load_golden(case: str, name: str = "golden.npz") -> dict:
  with np.load(GOLDEN / case / name) as file:
    return dict(file)


def to_reference(tree: dict, config: ModelConfig) -> dict[str, np.ndarray]:
  """Parameters, or their gradients, under the reference's names and in its shapes."""
  rows: dict[str, list[np.ndarray]] = {}
  for parameter in names.parameters(config):
    leaf = tree
    for key in parameter.path:
      leaf = leaf[key]
    rows.setdefault(parameter.openlm, []).append(leaf.T if parameter.transposed else leaf)
  return {name: np.concatenate(parts) for name, parts in rows.items()}
