"""Writes a tiny model directory with a trained tokenizer, and text for it; for tests, benchmarks and trial runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from supra_jax.core.plain_json import to_json
from supra_jax.model import config, presets
from supra_jax.model.registry import MixerConfig
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import save_model

VOCAB = 320
END = "<|endoftext|>"


def byte_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
  """Trains a byte-level BPE tokenizer with an end-of-text token as id 0.

  Args:
    texts: the texts to train on.
    vocab_size: number of tokens.

  Returns:
    Contents of a tokenizer.json.
  """
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str().encode()


@functools.cache
def tokenizer_json() -> bytes:
  """Returns the contents of a tokenizer.json with VOCAB tokens, trained on the standard library's documentation."""
  return byte_bpe([topics[name] for name in sorted(topics)[:20]], VOCAB)


def tiny_config(mixer: str | MixerConfig) -> config.ModelConfig:
  """Returns the preset `tiny` with the vocabulary of `tokenizer_json`, and with the same mixer in all layers."""
  return presets.tiny(mixer).replace(vocab_size=VOCAB, bos_token_id=None, eos_token_ids=(0,))


def write_checkpoint(directory: Path, mixer: str | MixerConfig, seed: int = 0, **changes) -> Path:
  """Writes a model directory with random parameters and a tokenizer, and returns `directory`.

  Args:
    directory: directory to make; it must not exist, or be empty.
    mixer: name or config of the mixer of all layers.
    seed: seeds the parameters.
    **changes: fields of the ModelConfig to change.
  """
  made = tiny_config(mixer).replace(**changes)
  init = jax.jit(lambda key: Transformer(made).init(key, jnp.zeros((1, 1), jnp.int32), method="logits"))
  params = jax.tree_util.tree_map_with_path(_away_from_zero, init(jax.random.key(seed))["params"])
  files = {"tokenizer.json": tokenizer_json()}
  save_model(
    directory, config=made, params=params, tokenizer_files=files, source={"made_by": "supra_jax.experiments.tiny"}
  )
  return directory


def _away_from_zero(path, leaf):
  """Makes biases of phi positive: if all features of a token were near 0, GroupNorm would amplify rounding errors."""
  is_phi = path[-2].key.startswith("feature_map") and path[-1].key == "bias"
  return jnp.abs(leaf) + 0.5 if is_phi else leaf


def write_text(path: Path) -> Path:
  """Writes a .jsonl file of 24 topics of the standard library's documentation, and returns its path."""
  path.write_text("".join(to_json({"text": topics[name]}) + "\n" for name in sorted(topics)[:24]))
  return path
