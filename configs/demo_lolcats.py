"""LoLCATs' layers (arXiv 2410.10254) on the demo's tokens, in LoLCATs' two stages: configs/demo.py with other options.

After `make demo`, which leaves the teacher and does not run this recipe:

    python -m supra_jax.bin.linearize --method=lolcats --checkpoint=runs/demo/teacher --output=runs/lolcats/linearized
    python -m supra_jax.bin.train --config=configs/demo_lolcats.py --workdir=runs/lolcats

In the first third of the steps, feature maps and factors of the window learn the teacher's attention. Then adapters of
rank 8 train with the cross-entropy. The feature maps go on training; LoLCATs' recipes freeze them.
"""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
  config = demo.get_config()
  config.init_checkpoint = "runs/lolcats/linearized"
  config.distill_from = "runs/demo/teacher"
  config.distill_weight = 0.0
  config.transfer_steps = 20
  config.transfer = "hedgehog|window_factor"
  config.adapters.rank = 8
  config.new_weights_rate = 3.0
  config.optimizer.learning_rate = 3e-3
  return config
