"""The demo: SmolLM2-135M-Instruct becomes an RNN, 35,840 tokens on two CPU cores in ten minutes.

    make demo

Its schedule is its own: the paper's 1000 steps of warmup would move nothing in so few tokens. Many small steps were
better than fewer large ones: see BUILD_NOTES.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.init_checkpoint = "runs/demo/linearized"
  config.batch_size = 1
  config.num_steps = 140
  config.dtype = "float32"
  config.remat = "none"
  config.seed = 0
  config.log_every = 1
  config.evaluate_every = 70
  config.save_every = 0

  config.data = ml_collections.ConfigDict()
  config.data.input = "pydoc:topics"
  config.data.sequence_length = 256
  config.data.heldout_every = 10
  config.data.heldout_rows = 12

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 2e-3
  config.optimizer.end_learning_rate = 1e-5
  config.optimizer.warmup_steps = 10
  return config
