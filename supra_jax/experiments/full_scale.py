"""All that reproducing table 3 at the paper's size takes: every command, its hours, and what a device has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from supra_jax.experiments.table_3_rows import ROWS, Row, check_rows
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import PEAK_FLOPS, train_flops_per_token
from supra_jax.model.presets import open_lm_1b
from supra_jax.model.registry import new_parameters
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.plan import plan as plan_of
from supra_jax.training.plan import planned_mesh

PACKED_A_SECOND = 0.5e6  # tokens that one core packs, see benchmarks/RESULTS.md, "Packing text"
LENGTH, TOKENS_A_STEP = 2048, 1024 * 2048
TOKENS = {"scratch": 1e11, "uptrained": 1e10}
DEVICES, DEVICE, MFU = 8, "NVIDIA H100 80GB HBM3", 0.4
EVALUATED = "hellaswag,arc_easy,arc_challenge"
TOKENIZER = "EleutherAI/gpt-neox-20b"


def plan(rows: Sequence[str], *, teacher: str = "models/teacher", compiled: bool = True) -> str:
  """Returns the commands of some rows, from the download on, with hours that follow from the model's FLOPs.

  Hours of training are those of DEVICES devices that reach MFU of their peak: an assumption, not a measurement.

  Args:
    rows: keys of `table_3.ROWS`.
    teacher: model directory of the teacher.
    compiled: whether each row's step is compiled, without weights, for the bytes that a device has to hold: seconds a
      row. It has to be called before anything else asks jax for devices.

  Raises:
    ValueError: a row is unknown or named twice.
  """
  check_rows(rows)
  mesh = planned_mesh(f"fsdp:{DEVICES}") if compiled else None
  parts = [
    "# The paper trains on RefinedWeb (tiiuae/falcon-refinedweb on the Hugging Face hub), 1B parameters (open_lm_1b).",
    "pip install -e '.[parquet,eval]'",
    "# Of 5,534 files a thousand, 84 GB: 90 to 117 billion tokens, by the 500 to 650 of the whole.",
    "hf download tiiuae/falcon-refinedweb --repo-type dataset --include 'data/train-00*' --local-dir refinedweb",
    f"# Packs {TOKENS['scratch']:.0e} tokens in {TOKENS['scratch'] / PACKED_A_SECOND / 3600:.0f} hours of one core.",
    "python -m supra_jax.bin.prepare_data --input='refinedweb/data/*.parquet' --text_key=content "
    f"--tokenizer={TOKENIZER} --heldout_every=10000 --output=data/refinedweb_neox",
    f"python -m supra_jax.bin.evaluate --tasks={EVALUATED} --fetch_only",
  ]
  if any(ROWS[row].begins == "teacher" for row in rows):
    parts += [
      f"# {teacher}: the paper's teacher is a transformer of this shape after 1.6 trillion tokens. The paper names no",
      "# download of it. convert_weights.hf_to_orbax makes the directory of any other that has the tokenizer above.",
      "# Without one, train the row transformer first and take that weaker one: --teacher=runs/transformer/checkpoint.",
    ]
  parts += [line for row in rows for line in _commands(row, ROWS[row], teacher, mesh)]
  return "\n".join(parts)


def _commands(name: str, row: Row, teacher: str, mesh: Mesh | None) -> Iterator[str]:
  """Yields the commands of one row: to make the model, to train it, and to evaluate it."""
  mixer, model = _spelled(row), f"models/{name}"
  shape = open_lm_1b(row.mixer)
  shape = shape.replace(layers=shape.layers * row.depth)
  tokens = TOKENS[row.kind] * row.passes
  steps = round(tokens / TOKENS_A_STEP)
  hours = tokens * train_flops_per_token(shape, LENGTH) / (PEAK_FLOPS[DEVICE] * MFU * DEVICES) / 3600
  most = "at most " if row.trains == "new" else ""  # frozen weights have no gradients
  how = f"{most}{hours:,.0f} hours of {DEVICES} {DEVICE} at {MFU:.0%} of their peak"
  yield f"\n# {row.title}: {tokens:.0e} tokens, {how}"
  if mesh is not None:
    yield f"# {_held(shape, row, steps, mesh)}"
  if row.kind == "scratch":
    layers = f" --set=num_layers={shape.num_layers}" if row.depth > 1 else ""
    yield (
      f"python -m supra_jax.bin.init --preset=open_lm_1b --mixer={mixer}{layers} --tokenizer={TOKENIZER} "
      f"--output={model}"
    )
  else:
    begins = "runs/transformer/checkpoint" if row.begins == "transformer" else teacher
    yield f"python -m supra_jax.bin.linearize --checkpoint={begins} --method=random --mixer={mixer} --output={model}"
  more = {
    "all": "",
    "new": f" --config.trainable='{new_parameters([row.mixer.mixer])}'",
    "new_then_all": f" --config.new_weights_steps={steps // row.passes}",
  }[row.trains]
  yield (
    f"python -m supra_jax.bin.train --config=configs/supra_1b.py --config.init_checkpoint={model} "
    f"--config.num_steps={steps}{more} --workdir=runs/{name}"
  )
  trained = f"runs/{name}/checkpoint"
  yield f"python -m supra_jax.bin.evaluate --checkpoint={trained} --tasks={EVALUATED} --output=runs/{name}.json"


def _held(shape: ModelConfig, row: Row, steps: int, mesh: Mesh) -> str:
  """Returns how many parameters a model has, and what a device holds at the peak of a step."""
  recipe = TrainConfig(
    "",
    DataConfig(input="text", sequence_length=LENGTH),
    batch_size=TOKENS_A_STEP // LENGTH,
    microbatches=8,
    num_steps=steps,
    dtype="bfloat16",
    trainable=new_parameters([row.mixer.mixer]) if row.trains == "new" else ".*",
  )
  made = plan_of(recipe, shape, mesh)
  peak = "not known" if made.memory is None else f"{made.memory.peak / 1e9:.1f} GB"
  return (
    f"{made.parameters:,} parameters, {made.trainable:,} train; a device of {DEVICES} holds {peak} (compiled for CPUs)"
  )


def _spelled(row: Row) -> str:
  """Returns the row's mixer as --mixer takes it."""
  plain = type(row.mixer)()
  fields = [field.name for field in dataclasses.fields(plain)]
  told = {name: getattr(row.mixer, name) for name in fields if getattr(row.mixer, name) != getattr(plain, name)}
  settings = ",".join(f"{name}={_text(value)}" for name, value in told.items())
  return f"{row.mixer.mixer}:{settings}" if settings else row.mixer.mixer


def _text(value: object) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)
