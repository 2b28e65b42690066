"""Generates one endless text, and measures whether its speed and memory stay what they are at its beginning.

    python -m benchmarks.stream [--tokens=1000000]              the preset `tiny`, with random weights
    python -m benchmarks.stream --checkpoint=DIR --cpu_hours=2

One row of an `Engine` draws at temperature 1; tokens that end a text do not end this one. A point is measured every
`--every` seconds of CPU time:

- tokens a second of CPU time, of all threads together, and tokens a second of wall clock. Wall clock counts when the
  process is stopped (SIGSTOP) or waits for a core, CPU time does not.
- the same of a fresh text, for an eighth of that time, right after it. What else runs on the machine slows both: their
  ratio shows what the length of the text does.
- resident memory; bytes of all arrays of jax, parameters included; bytes of the text's state.

Each point is written to stream_<name>_<device>.json. The state of the text is saved beside it, as `LM.read` and
`State.save` make it: after a kill, the same command goes on from there. Saving and fresh texts count in `--cpu_hours`,
and in no speed. State and process hold the ids of the text, 4 bytes a token. Draws a plot beside the JSON, with the
bytes of the keys and values that the softmax model would hold.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

import supra_jax
from benchmarks.machine import described, resident_bytes
from kernels_pallas.verdict import slug
from supra_jax.core.files import into_place
from supra_jax.core.plain_json import to_json
from supra_jax.core.sharding import least_tokens
from supra_jax.inference.decode import PREFILL_TOKENS
from supra_jax.inference.engine import Engine, Request
from supra_jax.inference.sampling import Sampling
from supra_jax.inference.state import State
from supra_jax.model.costs import state_bytes
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import layer
from supra_jax.model.transformer import Transformer

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Model directory. Empty: --preset with random weights.")
_PRESET = flags.DEFINE_enum("preset", "tiny", list(PRESETS), "Preset of the random model.")
_MIXER = flags.DEFINE_string("mixer", "supra_window", "Mixer of all layers of the random model.")
_NAME = flags.DEFINE_string("name", "", "Name in the files. Empty: that of the model directory, or the preset's.")
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "Tokens of the text to stop at.", lower_bound=1)
_CPU_HOURS = flags.DEFINE_float("cpu_hours", float("inf"), "Hours of CPU time, of all starts together, to stop at.")
_EVERY = flags.DEFINE_float("every", 60.0, "Seconds of CPU time between points.", lower_bound=0.1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON, the plot and the state.")

FRESH = 1 / 8  # time for a fresh text, as a share of `--every`
UNTIMED = 3  # steps in which what other texts have under way comes to its end
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Spent:
  """Tokens, and the seconds that they took: of CPU time, and of wall clock."""

  tokens: int
  cpu_seconds: float
  wall_seconds: float


def load() -> tuple[supra_jax.LM, str]:
  """Returns the model, without tokens that end a text, and its name."""
  if _CHECKPOINT.value:
    lm = supra_jax.load(_CHECKPOINT.value)
    endless = lm.config.replace(eos_token_ids=())
    return supra_jax.LM(endless, lm.params, fingerprint=lm.checkpoint), Path(_CHECKPOINT.value).name
  config = PRESETS[_PRESET.value](_MIXER.value).replace(eos_token_ids=())
  init = jax.jit(lambda key: Transformer(config).init(key, least_tokens(), method="logits"))
  return supra_jax.LM(config, init(jax.random.key(0))["params"]), _PRESET.value


def begin(lm: supra_jax.LM, state: State, tokens: int) -> Engine:
  """Returns an engine that draws so many tokens after a state."""
  (read,) = state.tokens
  engine = Engine(lm.model, lm.params, rows=1, capacity=read.size + tokens)
  # A text that goes on from a file has another seed, and so does not repeat the draws of its beginning.
  sampling = Sampling(temperature=1.0, seed=read.size)
  engine.submit(Request((), sampling, tokens, state.decode, state.hidden, read))
  return engine


def advance(engine: Engine, seconds: float) -> tuple[list[int], Spent]:
  """Generates for so many seconds of CPU time, or until the engine's text ends.

  Returns:
    (ids of all tokens, what those after the first UNTIMED steps took). A step returns when the call of the next is
    under way: so it is when the clock starts, and when it stops.
  """
  ids = [i for _ in range(UNTIMED) for i in step(engine)]
  first, began, began_cpu = len(ids), time.monotonic(), cpu_seconds()
  while engine.is_busy and cpu_seconds() - began_cpu < seconds:
    ids += step(engine)
  return ids, Spent(len(ids) - first, cpu_seconds() - began_cpu, time.monotonic() - began)


def step(engine: Engine) -> list[int]:
  """Returns the ids that one step of the engine draws."""
  drawn = [token for _, token in engine.step()]
  if not all(token.finite for token in drawn):
    raise FloatingPointError("The logits of a token are not finite.")
  return [token.id for token in drawn]


def cpu_seconds() -> float:
  """Returns the CPU time of this process so far, on all threads."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def cache_bytes(lm: supra_jax.LM, tokens: int) -> int:
  """Returns the bytes of the keys and values of so many tokens in the softmax model of the same shape."""
  softmax = lm.config.replace(layers=(layer("softmax"),) * lm.config.num_layers, sliding_window=None)
  return state_bytes(softmax, tokens, lm.model.dtype)


def stream(lm: supra_jax.LM, report: dict[str, Any], stem: Path) -> None:
  """Generates the text, after the saved state if there are points, and adds points to the report."""
  saved, points = stem.with_suffix(".state"), report["points"]
  beginning = lm.read([])
  state = lm.read([], supra_jax.load_state(saved)) if points else beginning
  start = points[-1]["start"] + 1 if points else 0
  before = sum({point["start"]: point["cpu_seconds_of_start"] for point in points}.values())
  advance(begin(lm, beginning, _TOKENS.value), 0.0)  # compiles
  engine = begin(lm, state, _TOKENS.value - state.tokens[0].size)
  unread: list[int] = []
  while engine.is_busy and before + cpu_seconds() < 3600 * _CPU_HOURS.value:
    ids, interval = advance(engine, _EVERY.value)
    _, fresh = advance(begin(lm, beginning, _TOKENS.value), _EVERY.value * FRESH)
    # Whole pieces only: each other length is one more program, which stays in memory.
    unread += ids
    whole = len(unread) // PREFILL_TOKENS * PREFILL_TOKENS
    state, unread = lm.read(unread[:whole], state), unread[whole:]
    state.save(saved)
    tokens = state.tokens[0].size + len(unread)
    point = {
      "tokens": tokens,
      "interval": dataclasses.asdict(interval),
      "fresh": dataclasses.asdict(fresh),
      "resident_bytes": resident_bytes(),
      "peak_resident_bytes": resident_bytes(peak=True),
      "array_bytes": sum(x.nbytes for x in jax.live_arrays()),
      "state_bytes": state.size_bytes,
      "cache_bytes": cache_bytes(lm, tokens),
      "start": start,
      "cpu_seconds_of_start": cpu_seconds(),
    }
    points.append(point)
    write(report, stem)
    print(row(point), flush=True)


def write(report: dict[str, Any], stem: Path) -> None:
  """Writes the JSON, whole or not at all."""
  with into_place(stem.with_suffix(".json")) as temporary:
    temporary.write_text(to_json(report, indent=1) + "\n")


def speed(spent: dict[str, Any], clock: str = "cpu_seconds") -> float:
  return spent["tokens"] / spent[clock]


def row(point: dict[str, Any]) -> str:
  """Returns the line of a table."""
  interval = point["interval"]
  speeds = (speed(interval), speed(point["fresh"]), speed(interval, "wall_seconds"))
  sizes = (point[f"{name}_bytes"] / MIB for name in ("resident", "peak_resident", "array", "state", "cache"))
  return " | ".join([f"{point['tokens']:>11,}", *(f"{x:8,.1f}" for x in speeds), *(f"{x:10,.2f}" for x in sizes)])


def summary(points: list[dict[str, Any]]) -> dict[str, float]:
  """Returns how speed and memory change over the text.

  Medians of the first and the last quarter of the points; a line fitted to all speeds, over the whole text; and growth
  of resident memory within each start after its first point, all starts together.
  """
  # An interval that the end of the text cuts short says little.
  timed = [point for point in points if point["interval"]["cpu_seconds"] > _EVERY.value / 2] or points
  speeds = [speed(point["interval"]) for point in timed]
  ratios = [speed(point["interval"]) / speed(point["fresh"]) for point in timed]
  quarter = max(len(timed) // 4, 1)
  found = {}
  for name, values in {"speed": speeds, "beside_fresh": ratios}.items():
    first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    tokens = np.array([point["tokens"] for point in timed], float)
    slope = np.polyfit(tokens, values, 1)[0] if len(timed) > 1 else 0.0
    found |= {f"{name}_first_quarter": first, f"{name}_last_quarter": last, f"{name}_change": last / first - 1}
    found[f"{name}_fitted_change"] = float(slope * (tokens[-1] - tokens[0]) / np.mean(values))
  starts = [[p for p in points if p["start"] == start][1:] for start in {point["start"] for point in points}]
  for name in ("resident_bytes", "array_bytes"):
    found[f"{name}_growth"] = sum(start[-1][name] - start[0][name] for start in starts if start)
  found["tokens_of_growth"] = sum(start[-1]["tokens"] - start[0]["tokens"] for start in starts if start)
  return found


def plot(report: dict[str, Any], path: Path) -> None:
  """Draws memory and speed against tokens."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  points = report["points"]
  tokens = [point["tokens"] for point in points]
  figure, (memory, speeds) = plt.subplots(2, 1, figsize=(6.5, 6.5), sharex=True)
  named = {
    "keys and values of the softmax model": ("cache_bytes", "--"),
    "the process, resident": ("resident_bytes", "-"),
    "arrays, parameters included": ("array_bytes", "-"),
    "the text's state": ("state_bytes", "-"),
  }
  for label, (name, style) in named.items():
    memory.plot(tokens, [point[name] / MIB for point in points], style, label=label)
  memory.set(title=f"{report['name']}, one text\n{report['device']}", ylabel="MiB", yscale="log")
  for label, name, style in (("this text", "interval", "."), ("a fresh text", "fresh", "x")):
    speeds.plot(tokens, [speed(point[name]) for point in points], style, label=label)
  speeds.set(xlabel="tokens of the text", ylabel="tokens a second of CPU time", ylim=(0, None))
  for axis in (memory, speeds):
    axis.grid(alpha=0.3)
    axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(_) -> None:
  lm, name = load()
  machine, name = described(), _NAME.value or name
  stem = Path(_OUTPUT.value, f"stream_{name}_{slug(machine['device'])}")
  stem.parent.mkdir(parents=True, exist_ok=True)
  report: dict[str, Any] = {"name": name, **machine, "mixers": sorted(set(lm.config.mixers)), "every": _EVERY.value}
  report["points"] = []
  if stem.with_suffix(".json").exists():
    report = json.loads(stem.with_suffix(".json").read_text())
  print("     tokens | tokens/s |    fresh |     wall |   resident |       peak |     arrays |      state |    softmax")
  if not report["points"] or report["points"][-1]["tokens"] < _TOKENS.value:
    stream(lm, report, stem)
  if not report["points"]:
    sys.exit("No point was measured: --cpu_hours is too small.")
  report["summary"] = summary(report["points"])
  write(report, stem)
  plot(report, stem.with_suffix(".png"))
  print(to_json(report["summary"], indent=1))


if __name__ == "__main__":
  app.run(main)
