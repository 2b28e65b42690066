"""The demo: makes SmolLM2-135M-Instruct an RNN from two starts, in ten minutes on two CPU cores.

    make demo

This is the recipe of the run with a memory; configs/demo_random.py is that of the run from the paper's start. Neither
has the paper's schedule, whose 1000 steps of warmup would be longer than the run. See benchmarks/RESULTS.md.
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
