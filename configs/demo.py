"""The demo: SmolLM2-135M-Instruct becomes an RNN twice, in ten minutes on two CPU cores.

    make demo

This is the recipe of the one with a window; configs/demo_random.py is that from the paper's start. The schedules are
their own: the paper's 1000 steps of warmup would move nothing in so few tokens. See BUILD_NOTES.md.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.init_checkpoint = "runs/demo/linearized"
  config.batch_size = 1
  config.num_steps = 60
  config.dtype = "float32"
  config.remat = "none"
  config.new_weights_rate = 0.1
  config.log_every = 1
  config.evaluate_every = 20
  config.save_every = 0

  config.data.input = "pydoc:topics"
  config.data.sequence_length = 256
  config.data.heldout_every = 10
  config.data.heldout_rows = 12

  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 10
  return config
