"""Tokenizers in the forms in which people have them, small, and what an export makes of each."""

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece

from convert_weights.tokenizer_export import exported_tokenizer
from convert_weights.tokenizer_source import tokenizer_files
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments.tiny import byte_bpe
from supra_jax.model.presets import tiny

CONFIG = tiny().replace(vocab_size=10_000, bos_token_id=None, eos_token_ids=())
TEXT = [line for name in sorted(topics)[:30] for line in topics[name].split("\n") if line.strip()]


def sentencepiece_model(**how) -> bytes:
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT), model_writer=written, vocab_size=600, byte_fallback=True, character_coverage=0.9995,
    unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    **{"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False} | how,
  )  # fmt: skip
  return written.getvalue()


def write(directory: Path, **files) -> Path:
  directory.mkdir(parents=True, exist_ok=True)
  for name, contents in files.items():
    stem, _, ending = name.rpartition("_")
    contents = json.dumps(contents) if isinstance(contents, dict) else contents
    (directory / f"{stem}.{ending}").write_bytes(contents.encode() if isinstance(contents, str) else contents)
  return directory


def sources(directory: Path) -> dict[str, Path]:
  """Directories of tokenizers whose class, flags or files releases of transformers disagree about."""
  byte_level = byte_bpe(TEXT, 512)
  named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
  kinds = {
    "sentencepiece": {"tokenizer_model": sentencepiece_model()},
    "sentencepiece with added tokens": {
      "tokenizer_model": sentencepiece_model(),
      "added_tokens_json": {"<|im_start|>": 600, "<|im_end|>": 601},
      "tokenizer_config_json": {"legacy": False, "eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizer"},
    },
    "TokenizersBackend": {
      "tokenizer_json": byte_level,
      "tokenizer_config_json": named
      | {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|x|>"]},
    },
    "byte-level Llama with BOS": {
      "tokenizer_json": byte_level,
      "tokenizer_config_json": named | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    },
    "byte-level Llama without BOS": {
      "tokenizer_json": byte_level,
      "tokenizer_config_json": named | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    },
  }
  for name, files in kinds.items():
    write(directory / name, config_json={"model_type": "llama"}, **files)
  return {name: directory / name for name in kinds}


def export(files: dict[str, bytes], directory: Path) -> Tokenizer:
  """Writes what an export of these files of a model directory has, and returns the model's own tokenizer."""
  ours = Tokenizer.from_files(files, CONFIG)
  write(directory, config_json={"model_type": "llama"})
  for name, contents in exported_tokenizer(files, ours).items():
    (directory / name).write_bytes(contents)
  return ours


def exports(directory: Path) -> dict[str, Tokenizer]:
  """Writes the exports of all sources, and of a model directory that still has a tokenizer.model."""
  ours = {
    name: export(tokenizer_files(source), directory / "exported" / name)
    for name, source in sources(directory / "sources").items()
  }
  name = "tokenizer.model of an older model directory"
  return ours | {name: export({"tokenizer.model": sentencepiece_model()}, directory / "exported" / name)}
