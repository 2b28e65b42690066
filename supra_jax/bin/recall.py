"""Measures what an RNN remembers: `python -m supra_jax.bin.recall --checkpoint=DIR --teacher=DIR --input=GLOB`."""

from __future__ import annotations

from typing import Any

from absl import flags

import supra_jax
from supra_jax.bin import model_flags
from supra_jax.bin.choices import whole_numbers
from supra_jax.bin.entry import DTYPES, run
from supra_jax.bin.implementation import with_implementation
from supra_jax.core.plain_json import check_output, write_json
from supra_jax.data.planted import KINDS, SPLITS
from supra_jax.data.text import read_documents
from supra_jax.evaluation import by_distance, recall
from supra_jax.evaluation.recall_tables import as_markdown

_load = model_flags.define()
_TEACHER = flags.DEFINE_string("teacher", None, "Model directory of the transformer it was made of.", required=True)
_INPUT = flags.DEFINE_string(
  "input", "pydoc:topics", "Long documents: glob of .txt, .jsonl[.gz|.zst] or .parquet, or pydoc:topics."
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "JSON key, or parquet column, that holds the text.")
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens that are read of a document.", lower_bound=2)
_DOCUMENTS = flags.DEFINE_integer("max_documents", 16, "Most documents to read.", lower_bound=2)
_DISTANCES = flags.DEFINE_list("distances", [str(n) for n in by_distance.DISTANCES], "Distances of planted facts.")
_KINDS = flags.DEFINE_multi_enum("kind", list(KINDS), KINDS, "Kind of planted facts; repeatable.")
_ITEMS = flags.DEFINE_integer("items", 16, "Planted texts of each kind and distance.", lower_bound=2)
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "Wording of planted facts; train is what models may be trained on.")
_SEED = flags.DEFINE_integer("seed", 0, "Determines the planted texts.")
_BATCH = flags.DEFINE_integer("batch_size", 2, "Documents or planted texts that are read at a time.", lower_bound=1)
_STATE = flags.DEFINE_enum("state_dtype", "bfloat16", DTYPES, "Dtype in which states hold keys and values.")
_SINKS = flags.DEFINE_integer(
  "sinks", None, "First tokens that the window of equal bytes holds. Default: as the model.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for all numbers. Default: none is written.")


def main() -> None:
  check_output(_OUTPUT.value)
  distances = whole_numbers(_DISTANCES) or []
  lm = _load()
  teacher = supra_jax.load(_TEACHER.value, lm.model.dtype, mesh=flags.FLAGS.mesh)
  if lm.tokenizer is None:
    raise ValueError("This checkpoint has no tokenizer to read text with: use supra_jax.evaluation.recall.report.")
  documents = map(lm.tokenizer.encode, read_documents(_INPUT.value, _TEXT_KEY.value))
  how: dict[str, Any] = {
    flag.name: flag.value for flag in (_LENGTH, _DOCUMENTS, _ITEMS, _SPLIT, _SEED, _BATCH, _STATE, _SINKS)
  }
  found = recall.report(lm, teacher, documents, distances=distances, kinds=_KINDS.value, progress=True, **how)
  print(as_markdown(found))
  if _OUTPUT.value:
    write_json(_OUTPUT.value, found)


if __name__ == "__main__":
  run(with_implementation(main))
