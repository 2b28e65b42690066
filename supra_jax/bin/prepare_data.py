"""Packs text to train on: `python -m supra_jax.bin.prepare_data --input=GLOB --tokenizer=DIR --output=DIR`."""

from __future__ import annotations

from typing import cast

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.config import ModelConfig
from supra_jax.files import place
from supra_jax.packed import Join
from supra_jax.packing import prepare
from supra_jax.tokenizer import Tokenizer

_INPUT = flags.DEFINE_string("input", None, ".txt, .jsonl[.gz|.zst], .parquet files; pydoc:topics.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Model directory, or its config.json and tokenizer.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make, with the parts `train` and `heldout`.", required=True)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens a row.", lower_bound=1)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Key of a JSON line, or column, that holds the text.")
_DOCUMENTS = flags.DEFINE_enum("documents", "join", ["join", "separate"], "Run documents together, or keep them apart.")
_BOS = flags.DEFINE_bool("bos", False, "Start each document with the begin-of-text id.")
_HELDOUT = flags.DEFINE_integer("heldout_every", 0, "Hold out every N-th document; 0: none.", lower_bound=0)
_WORKERS = flags.DEFINE_integer(
  "workers", None, "Processes that encode; 0 for none. Default: one a core.", lower_bound=0
)


def main() -> None:
  directory = place(_TOKENIZER.value)
  files = {path.name: path.read_bytes() for path in directory.glob("tokenizer*") if path.is_file()}
  config = ModelConfig.from_json((directory / "config.json").read_text())
  if (tokenizer := Tokenizer.from_files(files, config)) is None:
    raise ValueError(f"{directory} has neither a tokenizer.json nor a tokenizer.model.")
  made = prepare(
    _INPUT.value,
    tokenizer,
    _OUTPUT.value,
    vocab_size=config.vocab_size,
    sequence_length=_LENGTH.value,
    text_key=_TEXT_KEY.value,
    documents=cast(Join, _DOCUMENTS.value),
    bos=_BOS.value,
    heldout_every=_HELDOUT.value,
    workers=_WORKERS.value,
  )
  for name, info in (("train", made.train), ("heldout", made.heldout)):
    if info:
      print(
        f"{_OUTPUT.value}/{name}: {info.documents:,} documents, {info.tokens:,} tokens in {info.rows:,} rows of "
        f"{info.sequence_length:,}, {info.dropped_tokens:,} dropped."
      )
  speed = made.tokens_per_second
  print("All was packed before." if speed is None else f"{speed:,.0f} tokens/s.")


if __name__ == "__main__":
  run(main)
