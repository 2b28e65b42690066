"""Packs text into rows: `python -m supra_jax.bin.prepare_data --input=GLOB --tokenizer=DIR --output=DIR`."""

from __future__ import annotations

from typing import cast

from absl import flags

from supra_jax.bin.entry import run
from supra_jax.data.encoding import load_tokenizer
from supra_jax.data.packed import Documents
from supra_jax.data.packing import prepare

_INPUT = flags.DEFINE_string("input", None, "Glob of .txt, .jsonl[.gz|.zst], .parquet; pydoc:topics.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Directory of a model's tokenizer and config.json.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make, with the parts `train` and `heldout`.", required=True)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per row.", lower_bound=1)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
_DOCUMENTS = flags.DEFINE_enum(
  "documents", "join", ["join", "separate"], "join: a row is one text. separate: state is reset between documents."
)
_BOS = flags.DEFINE_bool("bos", False, "Start each document with the begin-of-text id.")
_HELDOUT = flags.DEFINE_integer("heldout_every", 0, "Hold out every N-th document; 0 holds none out.", lower_bound=0)
_ON_BAD = flags.DEFINE_enum(
  "on_bad_document", "stop", ["stop", "skip"], "At a line or row that holds no text: stop, or skip and count it."
)
_WORKERS = flags.DEFINE_integer("workers", None, "Worker processes; 0: none. Default: one per core.", lower_bound=0)


def main() -> None:
  tokenizer, config = load_tokenizer(_TOKENIZER.value)
  made = prepare(
    _INPUT.value,
    tokenizer,
    _OUTPUT.value,
    vocab_size=config.vocab_size,
    sequence_length=_LENGTH.value,
    text_key=_TEXT_KEY.value,
    documents=cast(Documents, _DOCUMENTS.value),
    bos=_BOS.value,
    heldout_every=_HELDOUT.value,
    skip_bad=_ON_BAD.value == "skip",
    workers=_WORKERS.value,
  )
  for name, info in (("train", made.train), ("heldout", made.heldout)):
    if info:
      print(
        f"{_OUTPUT.value}/{name}: {info.documents:,} documents, {info.tokens:,} tokens in {info.rows:,} rows of "
        f"{info.sequence_length:,}, {info.dropped_tokens:,} dropped."
      )
  if made.bad:
    more = f"; and {made.bad - len(made.bad_first):,} more" if made.bad > len(made.bad_first) else ""
    print(f"{made.bad:,} skipped, which hold no text: {'; '.join(made.bad_first)}{more}")
  speed = made.tokens_per_second
  print("All was packed before." if speed is None else f"{speed:,.0f} tokens/s.")


if __name__ == "__main__":
  run(main)
