"""SmolLM2-135M uptrained as an RNN on your own text, with the paper's recipe scaled to a small model.

    python -m supra_jax.bin.train --config=configs/smollm2_supra.py --workdir=runs/smollm2 \\
      --config.data.input='text/*.jsonl.zst'

Packed text is named instead by --config.data.input= --config.data.sources=DIR/train --config.data.heldout=DIR/heldout.

The paper's recipe for 1B parameters (section 7): AdamW (0.9, 0.95), 3e-4 to 1e-5 on a cosine after 1000 steps of
warmup, rows of 2048, bfloat16 over float32 master weights. Its batch is 2M tokens; here it is 64 rows, 131 thousand
tokens, so that 10,000 steps are 1.3 billion tokens.

Planned for one accelerator:

    python -m supra_jax.bin.plan --config=configs/smollm2_supra.py --mesh=fsdp:1 --device_memory=40GB

146 M parameters, 11 M of them new; 116 TFLOP a step. Parameters are 0.58 GB, optimizer state 1.16 GB, and the peak is
19.9 GB compiled for a CPU device; --config.microbatches=4 is for less memory. On two CPU cores a step of this size
takes minutes: use configs/demo.py there.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "smollm2_135m"
  config.init_checkpoint = "models/linearized"
  config.batch_size = 64
  config.num_steps = 10_000
  config.new_weights_rate = 0.1  # right for a window; what `linearize --method=random` made wants 1

  config.data.input = "text/*.jsonl.zst"
  config.data.heldout_every = 100
  config.data.heldout_rows = 256

  config.optimizer.learning_rate = 3e-4
  return config
