"""Draws the loss of models by position in long windows, side by side: whether they read on behind what they trained on.

    python -m benchmarks.loss_by_position --models=lightning=DIR,none=DIR --input=TEXT --trained=512

Each window of 16,384 tokens is read from a fresh state, on the same text for all models. A transformer whose RoPE was
trained on shorter texts loses more and more behind its length. Prints a row a doubling; writes JSON and a plot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import supra_jax
from supra_jax.bin.entry import run
from supra_jax.core.colours import CURVES, GREY
from supra_jax.core.files import local
from supra_jax.core.plain_json import check_output, write_json
from supra_jax.core.run_record import run_record
from supra_jax.evaluation.perplexity import evaluate_text
from supra_jax.experiments.gathered import named


def plot(found: dict[str, list[dict[str, Any]]], trained: int, path: Path) -> None:
  """Draws loss against position."""
  figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for (name, rows), colour in zip(found.items(), CURVES * 3, strict=False):
    axes.plot([row["first"] for row in rows], [row["loss"] for row in rows], color=colour, label=name, linewidth=1.6)
  if trained:
    axes.axvline(trained, color=GREY, linewidth=0.8, linestyle=":")
  axes.set_xscale("log", base=2)
  axes.set_xlabel("tokens read before")
  axes.set_title("loss, nats a token", loc="left", fontsize=10)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path)


def main() -> None:
  check_output(_OUTPUT.value, (".png",))
  models, found, lines = named(_MODELS.value), {}, {}
  for name, directory in models.items():
    loss = evaluate_text(
      supra_jax.load(directory),
      _INPUT.value,
      sequence_length=_LENGTH.value,
      max_tokens=_LENGTH.value * _WINDOWS.value,
      progress=True,
    )
    found[name], lines[name] = loss.by_position(2), loss.by_position(1)
    print(f"{name}: {loss.mean:.4f} nats a token", flush=True)
  output, trained = local(_OUTPUT.value), _TRAINED.value
  about = {"made_by": run_record(), "models": models, "length": _LENGTH.value, "windows": _WINDOWS.value}
  write_json(output, about | {"trained": trained, "by_position": found})
  plot(found, trained, output.with_suffix(".png"))
  print(f"| tokens read before | {' | '.join(models)} |\n| --- |{' --- |' * len(models)}")
  for rows in zip(*lines.values(), strict=True):
    losses = " | ".join("{loss:.3f}".format(**row) for row in rows)
    print(f"| {rows[0]['first']:,} to {rows[0]['last']:,} | {losses} |")


if __name__ == "__main__":
  _MODELS = flags.DEFINE_list("models", None, "NAME=DIR of each model; all with the same tokenizer.", required=True)
  _INPUT = flags.DEFINE_string("input", None, "Text, as evaluate takes it.", required=True)
  _LENGTH = flags.DEFINE_integer("length", 16384, "Tokens of a window.", lower_bound=2)
  _WINDOWS = flags.DEFINE_integer("windows", 8, "Number of windows.", lower_bound=1)
  _TRAINED = flags.DEFINE_integer("trained", 0, "Tokens of a row in training, drawn as a line; 0: none.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/loss_by_position.json", "JSON file to write.")
  run(main)
