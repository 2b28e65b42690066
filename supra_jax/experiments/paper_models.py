"""The models of the paper's tables 1 and 2: where their checkpoints are, how each is loaded here, and all commands."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Literal

PROGRAM = "python -m supra_jax.bin.reproduce"
CONVERTER = "python -m convert_weights.hf_to_orbax"
DATA = "qasper=data/qasper,narrativeqa=data/narrativeqa"
YARN = "yarn:4:"  # what stands before the directory of a model whose rotary embedding YaRN stretches 4 times

How = Literal["convert", "transformers", "remote code", "none"]


@dataclasses.dataclass(frozen=True)
class PaperModel:
  """A model of table 1 or 2.

  Attributes:
    name: name of its directory below `models`.
    table_1: the first three cells of its row in `paper.TABLE_1`: model, size, billions of tokens. None: it has no row.
    table_2: names of its rows in `paper.TABLE_2`.
    hub: name of the checkpoint on the Hugging Face hub; "": none is public, as far as is known here.
    how: how the checkpoint is loaded. `convert`: `convert_weights.hf_to_orbax` makes a model directory of it.
      `transformers`: a class of transformers' own. `remote code`: a class that comes with the checkpoint and runs only
      with --trust_remote_code. `none`: not at all.
    gated: whether the hub hands the files only to who has accepted the owner's terms.
    note: what else is known, in whole sentences.
  """

  name: str
  table_1: tuple[str, str, str] | None
  table_2: tuple[str, ...]
  hub: str
  how: How
  gated: bool = False
  note: str = ""

  @property
  def label(self) -> str:
    """The name that tables and figures call the model by: that of its row, with what tells it from other rows."""
    if self.table_1 is None:
      return self.table_2[0]
    row, size, tokens = self.table_1
    return " ".join([row, size, *([tokens] if tokens.startswith("+") else [])])

  @property
  def directory(self) -> str:
    """The model directory that `commands` converts the checkpoint to."""
    return f"models/{self.name}"

  @property
  def spec(self) -> str:
    """The checkpoint as `tables_1_2.table_1` takes it; "" if none is public."""
    if self.how == "none":
      return ""
    return self.directory if self.how == "convert" else f"hf:{self.hub}"


_PILE = (
  "The table says 600 billion tokens, the model's authors say 300 billion, of the Pile; the table's accuracies are "
  "within a point of those that they report. The converter takes it too."
)
_RWKV = (
  "The class `rwkv` of transformers is RWKV-4 and cannot load it. The checkpoint's own code was written for "
  "transformers 4; that it runs with transformers 5 has not been tried."
)
MODELS: tuple[PaperModel, ...] = (
  PaperModel("stablelm2_1.6b", ("StableLM2", "1.6B", "2000"), (), "stabilityai/stablelm-2-1_6b", "transformers"),
  PaperModel("stablelm_3b", ("StableLM", "3B", "1000"), (), "stabilityai/stablelm-3b-4e1t", "transformers"),
  PaperModel("gemma_2b", ("Gemma", "2B", "2000"), (), "google/gemma-2b", "transformers", gated=True),
  PaperModel(
    "mamba_1.4b", ("Mamba", "1.4B", "600"), (), "state-spaces/mamba-1.4b-hf", "transformers", note=_PILE
  ),
  PaperModel("rwkv5_1.5b", ("RWKV-5", "1.5B", "1100"), (), "RWKV/rwkv-5-world-1b5", "remote code", note=_RWKV),
  PaperModel(
    "mamba_2.8b", ("Mamba", "2.8B", "600"), (), "state-spaces/mamba-2.8b-hf", "transformers", note=_PILE
  ),
  PaperModel(
    "llama1_7b", None, ("Llama1-7B",), "huggyllama/llama-7b", "convert",
    note="A copy that others than Meta have uploaded; Meta itself gives the weights out on request alone.",
  ),
  PaperModel(
    "llama2_7b", ("Llama2", "7B", "2000"), ("Llama2-7B", "Llama2-7B*"), "meta-llama/Llama-2-7b-hf", "convert",
    gated=True,
  ),
  PaperModel("gemma_7b", ("Gemma", "7B", "6000"), (), "google/gemma-7b", "transformers", gated=True),
  PaperModel(
    "mistral_7b", ("Mistral", "7B", "8000(?)"), ("Mistral-7B",), "mistralai/Mistral-7B-v0.1", "convert",
    note="At times its owner has asked for an account on the hub.",
  ),
  PaperModel(
    "retnet_6.7b", ("RetNet", "6.7B", "200"), (), "", "none",
    note="No checkpoint is public; the paper's row is from the paper on RetNet.",
  ),
  PaperModel("recurrentgemma_2b", None, ("RecurrentGemma-2B",), "google/recurrentgemma-2b", "transformers", gated=True),
  PaperModel("rwkv5_7b", ("RWKV-5", "7B", "1100"), (), "RWKV/v5-Eagle-7B-HF", "remote code", note=_RWKV),
  PaperModel(
    "rwkv5_1.7t", ("RWKV-5-1.7T", "7B", "1700"), ("RWKV-5-1.7T",), "recursal/EagleX_1-7T", "remote code",
    note=f"{_RWKV} Whether this checkpoint comes with files for transformers is not known here.",
  ),
  PaperModel(
    "mamba_7b", ("Mamba (ours)", "7B", "1200"), ("Mamba (ours)",), "TRI-ML/mamba-7b-rw", "transformers",
    note="Trained in OpenLM, published in transformers' format: its model card loads it without remote code. That the "
    "converter takes it, as it takes the smaller Mambas, has not been tried.",
  ),
  PaperModel(
    "llama2_supra_20b", ("Llama2-SUPRA", "7B", "+20"), (), "", "none",
    note="No checkpoint is known to be public; configs/llama2_7b_supra.py trains it.",
  ),
  PaperModel(
    "mistral_supra_20b", ("Mistral-SUPRA", "7B", "+20"), (), "", "none",
    note="No checkpoint is known to be public; configs/mistral_7b_supra.py trains it.",
  ),
  PaperModel(
    "mistral_supra_100b", ("Mistral-SUPRA", "7B", "+100"), ("Mistral-SUPRA",), "TRI-ML/mistral-supra", "convert",
    note="The paper's own, in OpenLM's format.",
  ),
)  # fmt: skip


def commands(table: int) -> str:
  """Returns all commands that reproduce table 1 or 2 with the models that are public, with comments between.

  Results of all commands gather in one file, results/table_1.json or results/table_2.json, so that a model's directory
  may be deleted before the next model is converted.

  Raises:
    ValueError: `table` is neither 1 nor 2.
  """
  if table not in (1, 2):
    raise ValueError(f"table={table}: wanted 1 or 2.")
  models = [model for model in MODELS if (model.table_1 if table == 1 else model.table_2)]
  gated = [model.hub for model in models if model.gated and (table == 1 or _converts(model))]
  of_table = _table_1 if table == 1 else _table_2
  lines = [
    f"# Table {table}. A command that is typed again goes on where it stopped. A model that cannot be loaded is named",
    "# in the table as not run, and does not stop the others. A model of 7 billion parameters takes 15 GB in bfloat16;",
    "# one that is published in float16 becomes float32, twice that, unless the converter gets --dtype=bfloat16. A",
    "# model directory that is there already is not converted again: leave that command out.",
    "pip install -e '.[eval,torch]'",
    f"# Accept the terms of {', '.join(gated)} on their pages first, then:",
    "hf auth login",
    *_data(table),
    *(line for model in models for line in of_table(model)),
  ]
  return "\n".join(lines)


def _data(table: int) -> Iterator[str]:
  """Yields the commands that fetch what the models are asked."""
  if table == 1:
    yield "# The questions, which a later run on a machine without network finds in the cache:"
    yield "python -m supra_jax.bin.evaluate --tasks=table1 --fetch_only"
    return
  yield "# Into data/qasper: qasper-train-v0.3.json and qasper-dev-v0.3.json, from https://allenai.org/data/qasper."
  yield "# NarrativeQA takes parquet files, with pyarrow:"
  yield "pip install -e '.[parquet]'"
  yield (
    "hf download deepmind/narrativeqa --repo-type dataset --include 'data/validation-*' --local-dir data/narrativeqa"
  )


def _table_1(model: PaperModel) -> Iterator[str]:
  yield f"\n{_about(model, model.label)}"
  if model.how == "convert":
    yield f"{CONVERTER} --source={model.hub} --output={model.directory}"
  if model.how != "none":
    trust = " --trust_remote_code" if model.how == "remote code" else ""
    yield f"{PROGRAM} --table=1 {_models(model.label, model.spec)}{trust} --output=results/table_1.json"


def _table_2(model: PaperModel) -> Iterator[str]:
  """Yields the commands of a model's rows; the documents are read by models of this package alone."""
  yield f"\n{_about(model, ', '.join(model.table_2))}"
  if not _converts(model):
    yield "# Not run: table 2 is asked of model directories, which the converter cannot make of this model."
    return
  yield f"{CONVERTER} --source={model.hub} --output={model.directory}"
  for row in model.table_2:
    spec = f"{YARN}{model.directory}" if row.endswith("*") else model.directory
    yield f"{PROGRAM} --table=2 {_models(row, spec)} --data={DATA} --output=results/table_2.json"


def _converts(model: PaperModel) -> bool:
  """Whether a model directory can be made of the model; of the Mamba of 7 billion parameters it has not been tried."""
  return model.how == "convert" or "mamba" in model.hub


def _about(model: PaperModel, name: str) -> str:
  loads = {
    "convert": "converted to a model directory",
    "transformers": "run by transformers' own class",
    "remote code": "run by code that comes with the checkpoint",
    "none": "not run",
  }[model.how]
  gated = ", gated" if model.gated else ""
  return f"# {name}: {model.hub + gated + ', ' if model.hub else ''}{loads}." + (f" {model.note}" if model.note else "")


def _models(label: str, spec: str) -> str:
  return shlex.quote(f"--models={label}={spec}")
