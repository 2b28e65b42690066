"""The base of all recipes: the paper's recipe, with every option of a run. Not a recipe by itself.

A recipe calls `config = base.get_config()` and sets what differs. Options that are not set here have the defaults of
their dataclasses, which document them: `supra_jax/training/config.py` and `supra_jax/training/optimizer.py`.

The paper's recipe (arXiv 2405.06640, section 7): AdamW with betas (0.9, 0.95), cosine decay to 1e-5 after 1000 steps of
warmup, rows of 2048 tokens, bfloat16 computation over float32 master weights.
"""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict

from supra_jax.training.config import DataConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(defaults(TrainConfig))
  config.data = ml_collections.ConfigDict(defaults(DataConfig))
  # No defaults: every recipe has to set these.
  config.init_checkpoint = config_dict.placeholder(str)
  config.batch_size = config_dict.placeholder(int)
  config.num_steps = config_dict.placeholder(int)

  config.dtype = "bfloat16"
  config.remat = "block"
  config.evaluate_every = 500
  config.save_every = 500
  config.data.sequence_length = 2048

  config.optimizer.kind = "adamw"
  config.optimizer.learning_rate = 3e-5  # the paper's for 7B parameters; 3e-4 for 1B
  config.optimizer.end_learning_rate = 1e-5
  config.optimizer.warmup_steps = 1000
  config.optimizer.beta1 = 0.9
  config.optimizer.beta2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  return config


def defaults(cls: Any) -> dict[str, Any]:
  """Returns {field: default} of a config dataclass, for the fields that have a default; nested dataclasses as dicts."""
  values = {field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}
  return {
    name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()
  }
