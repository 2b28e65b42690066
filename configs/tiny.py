"""Trains a model of two small layers in seconds on a CPU, with all that a run does: a rehearsal, not a useful model.

    python -c 'from supra_jax.experiments import tiny; tiny.write_checkpoint("runs/tiny/model", "supra")'
    python -m supra_jax.bin.train --config=configs/tiny.py --workdir=runs/tiny/run

To plan the run for a mesh, whose devices need not be here:

    python -m supra_jax.bin.plan --config=configs/tiny.py --mesh=data:2,fsdp:2 --device_memory=1GB
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "tiny"
  config.init_checkpoint = "runs/tiny/model"
  config.batch_size = 8
  config.microbatches = 2
  config.num_steps = 20
  config.dtype = "float32"
  config.log_every = 5
  config.evaluate_every = 10
  config.save_every = 10

  config.data.input = "pydoc:topics"
  config.data.sequence_length = 64
  config.data.heldout_every = 10
  config.data.heldout_rows = 8

  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 5
  return config
