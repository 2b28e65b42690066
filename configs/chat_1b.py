"""Uptrains Llama-3.2-1B-Instruct as an RNN with a bounded memory on one card of 16 GB; Qwen3-0.6B too.

Adapters of rank 16 train towards the transformer's distribution of the next token; all other weights stay. From the
hub and text of your own to a model that transformers loads:

    python -m convert_weights.hf_to_orbax --source=meta-llama/Llama-3.2-1B-Instruct --output=models/teacher
    python -m supra_jax.bin.prepare_data --input=chat --messages_key=messages --tokenizer=models/teacher \\
      --output=data/chat --heldout_every=100
    python -m supra_jax.bin.linearize --checkpoint=models/teacher --output=models/memory --state_bytes=8MB \\
      --calibration_data=data/chat/train
    XLA_CLIENT_MEM_FRACTION=.95 python -m supra_jax.bin.train --config=configs/chat_1b.py --workdir=runs/chat
    python -m convert_weights.orbax_to_hf --source=runs/chat/checkpoint --output=models/shared --dtype=bfloat16

chat/ has files of conversations, {"messages": [{"role": "user", "content": ...}, ...]} a line of .jsonl, of which the
answers are learned; for text, all of which is, leave --messages_key out and say --documents=separate. JAX reserves
three quarters of a card's memory unless XLA_CLIENT_MEM_FRACTION says more. A step reads 16 rows of 2048 tokens, one row
at a time, and 1000 steps read 33 million tokens.

8 MB are 244 tokens of each key/value head of Llama; of Qwen3-0.6B, --state_bytes=30MB are 261. This plan needs no
weights and no accelerator, while models/ is not there:

    python -m supra_jax.bin.plan --config=configs/chat_1b.py --mixer=memory --mesh=fsdp:1 --device_memory=16GB

The model has 1.24 billion parameters, of which 3.4 million train; a step takes 330 TFLOP. Parameters take 4.96 GB,
optimizer state 0.03 GB, the teacher 2.47 GB, and peak memory is 14.9 GB compiled for a CPU device. 4.9 GB of them are
copies of the teacher's weights in float32, which XLA makes for CPUs alone. --model=qwen3_0_6b has 8.2 GB.

With 24 GB, four rows at a time take 16.7 GB (--config.microbatches=4), two 15.1 GB. Qwen3-0.6B takes 9.7 GB with
--config.microbatches=4. Nothing of this has run on a card yet.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.preset = "llama_3_2_1b"
  config.init_checkpoint = "models/memory"
  config.distill_from = "models/teacher"
  config.adapters.rank = 16
  config.batch_size = 16
  config.microbatches = 16
  config.num_steps = 1000
  config.evaluate_every = 100
  config.save_every = 100

  config.data.sources = "data/chat/train"
  config.data.heldout = "data/chat/heldout"
  config.data.documents = "separate"
  config.data.heldout_rows = 64

  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_steps = 20
  return config
