"""Uptrains Mistral-7B, the paper's main model, as an RNN on 20 billion tokens, or on 100 billion.

    python -m convert_weights.hf_to_orbax --source=DIR --output=models/mistral_7b
    python -m supra_jax.bin.linearize --method=random --checkpoint=models/mistral_7b \\
      --output=models/mistral_7b_linearized
    python -m supra_jax.bin.prepare_data --input='refinedweb/*.parquet' --text_key=content \\
      --tokenizer=models/mistral_7b --heldout_every=10000 --output=data/refinedweb_mistral
    python -m supra_jax.bin.train --config=configs/mistral_7b_supra.py --workdir=runs/mistral_7b

For 100 billion tokens add --config.num_steps=47684. The paper's recipe (section 7): AdamW with betas (0.9, 0.95),
cosine decay from 3e-5 to 1e-5 after 1000 steps of warmup, 2M tokens per step, rows of 2048 tokens, bfloat16 computation
over float32 master weights.

This plan for 8 GPUs of 80 GB needs no weights and no GPUs:

    python -m supra_jax.bin.plan --config=configs/mistral_7b_supra.py --mesh=fsdp:8 --device_memory=80GB

The model has 7.81 B parameters, 0.57 B of them new; a step takes 97.1 PFLOP. A device holds 3.91 GB of parameters and
7.82 GB of optimizer state. Peak memory of a device is 39.7 GB compiled for CPU devices and 31.1 GB compiled for H100s,
where a step gathers 483 GB of bfloat16 weights and scatters 500 GB of float32 gradients. On 128 devices,
--config.microbatches=1 keeps 8 rows per device.

Expected results: the paper reports 4300 tokens/s for an H100 at 7B, so that 20 billion tokens take 8 H100s 6.7 days;
the paper's 128 H100s took 1.5 days for 100 billion. Accuracies from the authors' repository, in percent:

               HellaSwag  PIQA  WinoGrande  ARC-E  ARC-C  MMLU
    Mistral-7B      81.0  82.1        74.0   80.9   53.8  62.4
    + 20 B          74.8  80.1        67.4   74.6   42.3  28.0
    + 100 B         77.1  80.4        70.3   75.9   45.8  34.2

This recipe has not been run: no accelerator was there.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "mistral_7b"
  config.init_checkpoint = "models/mistral_7b_linearized"
  config.batch_size = 1024
  config.microbatches = 16
  config.num_steps = 9_537

  config.data.sources = "data/refinedweb_mistral/train"
  config.data.heldout = "data/refinedweb_mistral/heldout"
  config.data.heldout_rows = 1024
  return config
