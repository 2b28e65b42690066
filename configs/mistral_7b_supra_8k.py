"""Uptrains Mistral-7B as an RNN on rows of 8,192 tokens, with the RoPE base that the paper takes for long rows, 1e6.

    python -m convert_weights.hf_to_orbax --source=DIR --output=models/mistral_7b
    python -m supra_jax.bin.linearize --method=random --rope_base=1e6 --checkpoint=models/mistral_7b \\
      --output=models/mistral_7b_linearized_1e6
    python -m supra_jax.bin.prepare_data --input='refinedweb/*.parquet' --text_key=content --sequence_length=8192 \\
      --tokenizer=models/mistral_7b --heldout_every=10000 --output=data/refinedweb_mistral_8k
    python -m supra_jax.bin.train --config=configs/mistral_7b_supra_8k.py --workdir=runs/mistral_7b_8k

All else is `configs/mistral_7b_supra.py`: 2M tokens a step, so that a step takes the same 97.1 PFLOP. The decay stays
the lightning one of the paper; --decay=retnet of `linearize` remembers further back.

This plan for 8 GPUs of 80 GB needs no weights and no GPUs:

    python -m supra_jax.bin.plan --config=configs/mistral_7b_supra_8k.py --mesh=fsdp:8 --device_memory=80GB

Peak memory of a device is 39.6 GB compiled for CPU devices, as with rows of 2,048. Loss by position, which tells
whether the model reads on behind the length that it was trained on, comes from

    python -m supra_jax.bin.evaluate --checkpoint=runs/mistral_7b_8k/checkpoint --input=TEXT --sequence_length=16384

This recipe has not been run: no accelerator was there.
"""

import ml_collections

from configs import mistral_7b_supra


def get_config() -> ml_collections.ConfigDict:
  config = mistral_7b_supra.get_config()
  config.init_checkpoint = "models/mistral_7b_linearized_1e6"
  config.batch_size = 256
  config.data.sequence_length = 8192
  config.data.sources = "data/refinedweb_mistral_8k/train"
  config.data.heldout = "data/refinedweb_mistral_8k/heldout"
  config.data.heldout_rows = 256
  return config
