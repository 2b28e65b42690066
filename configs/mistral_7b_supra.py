"""Mistral-7B uptrained as an RNN: the paper's main model.

python -m supra_jax.bin.plan --config=configs/mistral_7b_supra.py --mesh=fsdp:8 --device_memory=80GB
python -m supra_jax.bin.train --config=configs/mistral_7b_supra.py --workdir=runs/mistral_7b
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.preset = "mistral_7b"
  config.init_checkpoint = "models/mistral_7b_linearized"
  config.batch_size = 1024
  config.microbatches = 16
  config.num_steps = 9_537
  config.mesh = ""
  config.dtype = "bfloat16"
  config.remat = "block"
  config.seed = 0
  config.log_every = 10
  config.evaluate_every = 500
  config.save_every = 500
  config.keep_checkpoints = 2

  config.data = ml_collections.ConfigDict()
  config.data.sources = "data/refinedweb/train"
  config.data.heldout = "data/refinedweb/heldout"
  config.data.heldout_rows = 1024
  config.data.sequence_length = 2048

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.kind = "adamw"
  config.optimizer.moment_dtype = "float32"
  config.optimizer.learning_rate = 3e-5
  config.optimizer.end_learning_rate = 1e-5
  config.optimizer.warmup_steps = 1000
  config.optimizer.beta1 = 0.9
  config.optimizer.beta2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  config.optimizer.z_loss = 1e-4
  return config
