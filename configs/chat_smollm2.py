"""Teaches SmolLM2-135M, as an RNN with a bounded memory, to answer as conversations of your own do: minutes on a CPU.

    python -m supra_jax.bin.prepare_data --input=talks.jsonl --messages_key=messages --tokenizer=models/teacher \\
      --output=data/talks --sequence_length=512 --heldout_every=10
    python -m supra_jax.bin.linearize --checkpoint=models/teacher --output=models/rnn --state_bytes=2MB
    python -m supra_jax.bin.train --config=configs/chat_smollm2.py --workdir=runs/chat

A line of talks.jsonl is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. Only
what the assistant says is learned, with the token that ends it. Adapters of rank 16 train; all other weights stay. With
--config.distill_from=models/teacher --config.distill_weight=0.5 the transformer's own answers count as much as yours.
A step reads 4 rows of 512 tokens, and 10 steps read 20 thousand tokens: two to three minutes on two cores.
"""

import ml_collections

from configs import chat_1b


def get_config() -> ml_collections.ConfigDict:
  config = chat_1b.get_config()
  config.preset = "smollm2_135m"
  config.init_checkpoint = "models/rnn"
  config.distill_from = ""
  config.dtype = "float32"
  config.batch_size = 4
  config.microbatches = 2
  config.num_steps = 10
  config.log_every = 1
  config.evaluate_every = 5
  config.save_every = 5

  config.data.sources = "data/talks/train"
  config.data.heldout = "data/talks/heldout"
  config.data.heldout_rows = 8
  config.data.sequence_length = 512

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 3
  return config
