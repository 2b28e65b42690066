"""Packs text into rows: `python -m supra_jax.bin.prepare_data --input=GLOB --tokenizer=DIR --output=DIR`."""

from __future__ import annotations

from typing import cast

from absl import flags

from supra_jax.bin.any_tokenizer import any_tokenizer
from supra_jax.bin.entry import run
from supra_jax.data.packed import Documents
from supra_jax.data.packing import prepare

_FILES = "Directory or globs of .txt, .md, .jsonl[.gz|.zst], .json, .csv, .parquet; pydoc:topics."
_INPUT = flags.DEFINE_string("input", None, _FILES, required=True)
_MODEL = "Model whose tokenizer is taken: a directory, or owner/name on the hub."
_TOKENIZER = flags.DEFINE_string("tokenizer", None, _MODEL, required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make, with the parts `train` and `heldout`.", required=True)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per row.", lower_bound=1)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or column, that holds the text.")
_MESSAGES_KEY = flags.DEFINE_string(
  "messages_key", "", "Key of conversations, in place of text: the model learns what the assistant says."
)
_DOCUMENTS = flags.DEFINE_enum(
  "documents", None, ["join", "separate"],
  "join: a row is one text. separate: state is reset between documents. Default: join; separate with --messages_key.",
)  # fmt: skip
_BOS = flags.DEFINE_bool("bos", False, "Start each document with the begin-of-text id.")
_HELDOUT = flags.DEFINE_integer("heldout_every", 0, "Hold out every N-th document; 0 holds none out.", lower_bound=0)
_ON_BAD = flags.DEFINE_enum(
  "on_bad_document", "stop", ["stop", "skip"], "At a line or row that holds no text: stop, or skip and count it."
)
_WORKERS = flags.DEFINE_integer("workers", None, "Worker processes; 0: none. Default: one per core.", lower_bound=0)


def main() -> None:
  found = any_tokenizer(_TOKENIZER.value)
  made = prepare(
    _INPUT.value,
    found.tokenizer,
    _OUTPUT.value,
    vocab_size=found.vocab_size,
    sequence_length=_LENGTH.value,
    text_key=_TEXT_KEY.value,
    messages_key=_MESSAGES_KEY.value,
    documents=cast(Documents | None, _DOCUMENTS.value),
    bos=_BOS.value,
    heldout_every=_HELDOUT.value,
    skip_bad=_ON_BAD.value == "skip",
    workers=_WORKERS.value,
  )
  print("\n".join(made.lines(_OUTPUT.value)))


if __name__ == "__main__":
  run(main)
