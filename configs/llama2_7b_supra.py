"""Uptrains Llama-2-7B as an RNN on 20 billion tokens, as the paper does, or on 100 billion.

    python -m convert_weights.hf_to_orbax --source=DIR --output=models/llama2_7b
    python -m supra_jax.bin.linearize --method=random --checkpoint=models/llama2_7b \\
      --output=models/llama2_7b_linearized
    python -m supra_jax.bin.prepare_data --input='refinedweb/*.parquet' --text_key=content \\
      --tokenizer=models/llama2_7b --heldout_every=10000 --output=data/refinedweb_llama2
    python -m supra_jax.bin.train --config=configs/llama2_7b_supra.py --workdir=runs/llama2_7b

For 100 billion tokens add --config.num_steps=47684. The paper's recipe (section 7): AdamW with betas (0.9, 0.95),
cosine decay from 3e-5 to 1e-5 after 1000 steps of warmup, 2M tokens per step, rows of 2048 tokens, bfloat16 computation
over float32 master weights.

This plan for 8 GPUs of 80 GB needs no weights and no GPUs:

    python -m supra_jax.bin.plan --config=configs/llama2_7b_supra.py --mesh=fsdp:4,tensor:2 --device_memory=80GB

The model has 7.28 B parameters, 0.54 B of them new; a step takes 97.1 PFLOP. A device holds 3.64 GB of parameters and
7.28 GB of optimizer state. Peak memory of a device is 34.6 GB compiled for CPU devices and 26.8 GB compiled for H100s.
Compiled for H100s, a step with fsdp:4,tensor:2 gathers 1033 GB of bfloat16, sums 966 GB of activations over devices,
and scatters 466 GB of float32 gradients. With fsdp:8 and --config.microbatches=16, which has as many rows per device,
a step gathers 483 GB and scatters 466 GB, and the peak is 29.3 GB. Hence no `tensor` by default: the feature map mixes
all heads, and `tensor` has to gather them for it.

Expected results: the paper reports 4300 tokens/s for an H100 at 7B, so that 20 billion tokens take 8 H100s 6.7 days.
Accuracies from the authors' repository, in percent:

               HellaSwag  PIQA  WinoGrande  ARC-E  ARC-C  MMLU
    Llama-2-7B      76.0  79.1        69.1   76.3   46.3  45.9
    + 20 B          71.8  78.6        65.8   71.1   39.5  24.9

This recipe has not been run: no accelerator was there.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "llama2_7b"
  config.init_checkpoint = "models/llama2_7b_linearized"
  config.batch_size = 1024
  config.microbatches = 32
  config.num_steps = 9_537

  config.data.sources = "data/refinedweb_llama2/train"
  config.data.heldout = "data/refinedweb_llama2/heldout"
  config.data.heldout_rows = 1024
  return config
