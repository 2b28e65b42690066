"""Uptrains SmolLM2-135M as an RNN on your own text, with the paper's recipe scaled to a small model.

    python -m supra_jax.bin.train --config=configs/smollm2_supra.py --workdir=runs/smollm2 \\
      --config.data.input='text/*.jsonl.zst'

For text that is packed already: --config.data.input= --config.data.sources=DIR/train --config.data.heldout=DIR/heldout.

The paper's recipe for 1B parameters (section 7): AdamW with betas (0.9, 0.95), cosine decay from 3e-4 to 1e-5 after
1000 steps of warmup, rows of 2048 tokens, bfloat16 computation over float32 master weights. The paper's batch has 2M
tokens; here a batch has 64 rows, 131 thousand tokens, so that 10,000 steps read 1.3 billion tokens.

This plan for one accelerator needs no weights and no accelerator:

    python -m supra_jax.bin.plan --config=configs/smollm2_supra.py --mesh=fsdp:1 --device_memory=40GB

The model has 146 M parameters, 11 M of them new; a step takes 116 TFLOP. Parameters take 0.58 GB, optimizer state
1.16 GB, and peak memory is 19.9 GB compiled for a CPU device; --config.microbatches=4 needs less. On two CPU cores a
step of this size takes minutes: use configs/demo.py there.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "smollm2_135m"
  config.init_checkpoint = "models/linearized"
  config.batch_size = 64
  config.num_steps = 10_000

  config.data.input = "text/*.jsonl.zst"
  config.data.heldout_every = 100
  config.data.heldout_rows = 256

  config.optimizer.learning_rate = 3e-4
  return config
