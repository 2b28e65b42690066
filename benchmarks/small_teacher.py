"""Trains a small transformer, for longer curves of `benchmarks.tokens_to_quality` than a CPU can measure on a real one.

    python -m benchmarks.small_teacher --input=TEXT --workdir=DIR [--num_steps=6000]

Trains a byte-level BPE tokenizer of 2,048 tokens on the text, packs the text with it (`DIR/data`), and trains a Llama
of 1.3 million parameters from scratch (`DIR/run/checkpoint`). The same command resumes a killed benchmark.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags

import supra_jax
from supra_jax.bin.entry import run
from supra_jax.core.sharding import least_tokens
from supra_jax.data.packing import prepare
from supra_jax.data.text import documents_in_turns
from supra_jax.experiments import tiny
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import layers
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import save_model
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.optimizer import OptimizerConfig

LENGTH, ROWS = 128, 32  # tokens of a row, rows of a batch
CONFIG = ModelConfig(
  vocab_size=2048,
  hidden_size=128,
  intermediate_size=344,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  layers=layers(("softmax",) * 6),
  tie_embeddings=True,
  max_positions=LENGTH,
  eos_token_ids=(0,),
)


def make_tokenizer(pattern: str, megabytes: int = 20) -> bytes:
  """Trains a tokenizer on the first `megabytes` million characters of a text, reading its files in turn.

  Returns:
    Contents of a tokenizer.json.
  """
  texts, characters = [], 0
  for text in documents_in_turns(pattern):
    texts.append(text)
    characters += len(text)
    if characters >= megabytes * 10**6:
      break
  return tiny.byte_bpe(texts, CONFIG.vocab_size)


def main() -> None:
  workdir = Path(_WORKDIR.value)
  start, data = workdir / "start", workdir / "data"
  if not start.exists():
    init = Transformer(CONFIG).init(jax.random.key(0), least_tokens(), method="logits")
    files = {"tokenizer.json": make_tokenizer(_INPUT.value), "tokenizer_config.json": b"{}"}
    save_model(start, config=CONFIG, params=init["params"], tokenizer_files=files, source={"made_by": __doc__})
  model = supra_jax.load(start)
  assert model.tokenizer is not None
  prepare(_INPUT.value, model.tokenizer, data, vocab_size=CONFIG.vocab_size, sequence_length=LENGTH, heldout_every=50)
  packed = DataConfig(
    sources=str(data / "train"), heldout=str(data / "heldout"), heldout_rows=64, sequence_length=LENGTH
  )
  steps = _NUM_STEPS.value
  config = TrainConfig(
    init_checkpoint=str(start),
    data=packed,
    batch_size=ROWS,
    num_steps=steps,
    dtype="float32",
    remat="none",
    optimizer=OptimizerConfig(learning_rate=3e-3, end_learning_rate=3e-5, warmup_steps=steps // 20),
    evaluate_every=max(steps // 10, 1),
    save_every=max(steps // 10, 1),
  )
  summary = train(config, workdir / "run")
  print(f"Held-out loss {summary.nll_after:.3f} nats a token after {summary.tokens_trained:,} tokens.")


if __name__ == "__main__":
  _INPUT = flags.DEFINE_string("input", None, "Text to train on, as prepare_data takes it.", required=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory that everything is written to.", required=True)
  _NUM_STEPS = flags.DEFINE_integer("num_steps", 6000, f"Steps of {ROWS} rows of {LENGTH} tokens.", lower_bound=1)
  run(main)
