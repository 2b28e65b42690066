"""All that reproducing table 3 at the paper's size takes: every command, its hours, and what a device has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from supra_jax.experiments.table_3 import ROWS, Row
from supra_jax.model.costs import PEAK_FLOPS, train_flops_per_token
from supra_jax.model.presets import open_lm_1b

PACKED_A_SECOND = 0.5e6  # tokens that one core packs, see benchmarks/RESULTS.md, "Packing text"
LENGTH, TOKENS_A_STEP = 2048, 1024 * 2048
TOKENS = {"teacher": 1.6e12, "scratch": 1e11, "uptrained": 1e10}
DEVICES, DEVICE, MFU = 8, "NVIDIA H100 80GB HBM3", 0.4
EVALUATED = "hellaswag,arc_easy,arc_challenge"


def plan(rows: Sequence[str]) -> str:
  """Returns the commands of some rows, from the download on, with hours that follow from the model's FLOPs.

  Hours of training are those of DEVICES devices that reach MFU of their peak: an assumption, not a measurement.
  """
  parts = [
    "# The paper trains on RefinedWeb (tiiuae/falcon-refinedweb on the Hugging Face hub), 1B parameters (open_lm_1b).",
    "hf download tiiuae/falcon-refinedweb --repo-type dataset --local-dir refinedweb",
    "python -m supra_jax.bin.init --preset=open_lm_1b --mixer=softmax --tokenizer=EleutherAI/gpt-neox-20b "
    "--output=models/transformer_random",
    f"# Packs {TOKENS['scratch']:.0e} tokens in {TOKENS['scratch'] / PACKED_A_SECOND / 3600:.0f} hours of one core.",
    "python -m supra_jax.bin.prepare_data --input='refinedweb/data/*.parquet' --text_key=content "
    "--tokenizer=models/transformer_random --heldout_every=10000 --output=data/refinedweb_neox",
    "# What a device has to hold:",
    f"python -m supra_jax.bin.plan --config=configs/supra_1b.py --mesh=fsdp:{DEVICES} --device_memory=80GB",
    "# The teacher is a transformer of 1.6 trillion tokens. Without one, `transformer` below is the weaker teacher.",
  ]
  parts += [line for row in rows for line in _commands(row, ROWS[row])]
  return "\n".join(parts)


def _commands(name: str, row: Row) -> Iterator[str]:
  """Yields the commands of one row: to make the model, to train it, and to evaluate it."""
  mixer, model = _spelled(row), f"models/{name}"
  shape = open_lm_1b(row.mixer)
  shape = shape.replace(layers=shape.layers * row.depth)
  tokens = TOKENS[row.kind] * (2 if row.trains == "new_then_all" else 1)
  steps = round(tokens / TOKENS_A_STEP)
  hours = tokens * train_flops_per_token(shape, LENGTH) / (PEAK_FLOPS[DEVICE] * MFU * DEVICES) / 3600
  yield f"\n# {row.title}: {tokens:.0e} tokens, {hours:,.0f} hours of {DEVICES} {DEVICE} at {MFU:.0%} of their peak"
  if row.kind == "scratch":
    layers = f" --set=num_layers={shape.num_layers}" if row.depth > 1 else ""
    yield (
      f"python -m supra_jax.bin.init --preset=open_lm_1b --mixer={mixer}{layers} --tokenizer=EleutherAI/gpt-neox-20b "
      f"--output={model}"
    )
  else:
    teacher = "runs/transformer/checkpoint" if row.begins == "transformer" else "models/teacher"
    yield f"python -m supra_jax.bin.linearize --checkpoint={teacher} --method=random --mixer={mixer} --output={model}"
  more = {
    "all": "",
    "new": " --config.trainable='feature_map|[qk]_norm'",
    "new_then_all": f" --config.new_weights_steps={steps // 2}",
  }[row.trains]
  yield (
    f"python -m supra_jax.bin.train --config=configs/supra_1b.py --config.init_checkpoint={model} "
    f"--config.num_steps={steps}{more} --workdir=runs/{name}"
  )
  trained = f"runs/{name}/checkpoint"
  yield f"python -m supra_jax.bin.evaluate --checkpoint={trained} --tasks={EVALUATED} --output=runs/{name}.json"


def _spelled(row: Row) -> str:
  """Returns the row's mixer as --mixer takes it."""
  plain = type(row.mixer)()
  fields = [field.name for field in dataclasses.fields(plain)]
  told = {name: getattr(row.mixer, name) for name in fields if getattr(row.mixer, name) != getattr(plain, name)}
  settings = ",".join(f"{name}={_text(value)}" for name, value in told.items())
  return f"{row.mixer.mixer}:{settings}" if settings else row.mixer.mixer


def _text(value: object) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)
