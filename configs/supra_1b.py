"""Trains a SUPRA model of 1B parameters from scratch on 100 billion tokens: OpenLM's 1B, the paper's other size.

First draw a model with random parameters, as OpenLM does, for GPT-NeoX's tokenizer:

    python -m supra_jax.bin.init --preset=open_lm_1b --tokenizer=EleutherAI/gpt-neox-20b --output=models/supra_1b_random
    python -m supra_jax.bin.prepare_data --input='refinedweb/data/*.parquet' --text_key=content \\
      --tokenizer=models/supra_1b_random --heldout_every=10000 --output=data/refinedweb_neox
    python -m supra_jax.bin.train --config=configs/supra_1b.py --workdir=runs/supra_1b

The paper's recipe for 1B parameters and from scratch (section 7): AdamW with betas (0.9, 0.95), cosine decay from 3e-4
to 1e-5 after 1000 steps of warmup, 2M tokens per step, rows of 2048 tokens, bfloat16 computation over float32 master
weights. The same values uptrain a 1B transformer: set --config.init_checkpoint to the linearised model directory, and
--config.num_steps=4769 for 10 billion tokens.

This plan for 8 GPUs of 80 GB needs no weights and no GPUs:

    python -m supra_jax.bin.plan --config=configs/supra_1b.py --mesh=fsdp:8 --device_memory=80GB

The model has 1.54 B parameters; a step takes 19.5 PFLOP. A device holds 0.77 GB of parameters and 1.54 GB of optimizer
state. Peak memory of a device is 20.9 GB compiled for CPU devices and 13.1 GB compiled for H100s, where a step gathers
46 GB of bfloat16 weights and scatters 49 GB of float32 gradients.

Expected results: table 3 of the paper compares such runs. This recipe has not been run: no accelerator was there. At 3
million parameters SUPRA from a teacher has 4.44 nats, from scratch 5.16 (benchmarks/RESULTS.md, table 3).
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "open_lm_1b"
  config.init_checkpoint = "models/supra_1b_random"
  config.batch_size = 1024
  config.microbatches = 8
  config.num_steps = 47_684

  config.data.sources = "data/refinedweb_neox/train"
  config.data.heldout = "data/refinedweb_neox/heldout"
  config.data.heldout_rows = 1024

  config.optimizer.learning_rate = 3e-4
  return config
