"""Times tasks of lm-evaluation-harness: our model, and lm-eval's `hf` model of the same weights at its best batch size.

    python -m benchmarks.evaluate_speed --checkpoint=DIR --hf=DIR --data_dir=DIR

`--hf` is a directory that `convert_weights.orbax_to_hf` wrote of a softmax model. `--rnn` is a further model directory,
an RNN made from it, say, which is timed as ours is. The questions are the first `--limit` of each task. Batch sizes of
`hf` are tried on the first quarter of them, and the fastest is taken. Contestants take turns; medians of wall clock and
of CPU time, without loading, and for ours without compiling: a first turn is not counted, its time stands beside. Also
the answers: how many differ, and by how much log-likelihoods do. Tasks that the JSON has already are not timed again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.machine import described
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory.", required=True)
_HF = flags.DEFINE_string("hf", None, "The same model for transformers.", required=True)
_RNN = flags.DEFINE_string("rnn", None, "A further model directory. Default: none.")
_DATA = flags.DEFINE_string("data_dir", None, "Directory of the tasks' data sets. Default: the Hugging Face hub.")
_TASKS = flags.DEFINE_list("tasks", ["hellaswag", "mmlu_anatomy"], "Tasks, each timed alone.")
_LIMIT = flags.DEFINE_integer("limit", 200, "Questions of each task.", lower_bound=8)
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "Batch sizes of hf that are tried.")
_TURNS = flags.DEFINE_integer("turns", 3, "Turns of each contestant.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON.")


def timed(ask: Callable[[], Any]) -> tuple[float, float, Any]:
  """Returns (seconds of wall clock, of CPU time, what was returned)."""
  wall, cpu = time.perf_counter(), time.process_time()
  found = ask()
  return time.perf_counter() - wall, time.process_time() - cpu, found


def answers(results: dict[str, Any]) -> list[list[tuple[float, bool]]]:
  """Returns the log-likelihoods of each question, in the order of its answers."""
  (samples,) = results["samples"].values()
  return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
  """Returns how many questions are answered differently, near ties among them, and the largest difference."""
  flipped, ties, largest = 0, 0, 0.0
  for a, b in zip(answers(ours), answers(theirs), strict=True):
    left, right = [score for score, _ in a], [score for score, _ in b]
    largest = max(largest, *(abs(x - y) for x, y in zip(left, right, strict=True)))
    if left.index(max(left)) != right.index(max(right)):
      first, second = sorted(right)[-1], sorted(right)[-2]
      flipped, ties = flipped + 1, ties + (first - second < 1e-3)
  return {"answered_differently": flipped, "of_which_near_ties": ties, "largest_difference": largest}


def main(argv: list[str]) -> None:
  del argv
  from lm_eval.models.huggingface import HFLM

  import supra_jax
  from supra_jax.evaluation.harness import HarnessLM
  from supra_jax.evaluation.tasks import Exam, evaluate_tasks

  ours = {"supra_jax": _CHECKPOINT.value} | ({"supra_jax, RNN": _RNN.value} if _RNN.value else {})
  loaded = {name: supra_jax.load(directory) for name, directory in ours.items()}
  hf = HFLM(pretrained=_HF.value, batch_size=1, dtype="float32", device="cpu")
  facts = described() | {"command": "python -m benchmarks.evaluate_speed", "limit": _LIMIT.value}
  path = Path(_OUTPUT.value) / f"evaluate_speed_{slug(facts['device'])}.json"
  made: dict[str, Any] = facts | {"tasks": {}}
  if path.exists():
    earlier = json.loads(path.read_text())
    made = earlier if facts.items() <= earlier.items() else made
  for task in [task for task in _TASKS.value if task not in made["tasks"]]:

    def exam(limit: int, task: str = task) -> Exam:
      return Exam((task,), 5 if task.startswith("mmlu") else 0, limit, _DATA.value, log_samples=True)

    def ask_hf(size: int, limit: int, exam: Any = exam) -> dict[str, Any]:
      hf.batch_size_per_gpu = size
      return evaluate_tasks(hf, exam(limit))

    tried = {size: timed(lambda s=size: ask_hf(s, _LIMIT.value // 4))[0] for size in map(int, _BATCHES.value)}
    best = min(tried, key=tried.__getitem__)
    contestants = {f"hf, batch {best}": lambda best=best: ask_hf(best, _LIMIT.value)}
    for name, lm in loaded.items():
      contestants[name] = lambda lm=lm, exam=exam: evaluate_tasks(HarnessLM(lm=lm, progress=False), exam(_LIMIT.value))
    first = {name: timed(ask) for name, ask in contestants.items() if name in loaded}
    turns: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in contestants}
    for _ in range(_TURNS.value):
      for name, ask in contestants.items():
        turns[name].append(timed(ask))
    row: dict[str, Any] = {"turns": _TURNS.value, "hf_batches": tried}
    for name, runs in turns.items():
      results = runs[0][2]
      row[name] = {
        "seconds": statistics.median(wall for wall, _, _ in runs),
        "cpu_seconds": statistics.median(cpu for _, cpu, _ in runs),
        "first_seconds": first[name][0] if name in first else None,
        "tokens": results.get("tokens"),
        "score": next(iter(results["results"].values())),
      }
    row["against_hf"] = differences(turns["supra_jax"][0][2], turns[f"hf, batch {best}"][0][2])
    made["tasks"][task] = row
    theirs = row[f"hf, batch {best}"]
    for name in loaded:
      ratio = theirs["seconds"] / row[name]["seconds"]
      print(f"{task}: {name} {row[name]['seconds']:.1f} s, {row[name]['tokens']}; {ratio:.2f} times hf", flush=True)
    print(f"{task}: hf {theirs['seconds']:.1f} s at batch {best}; {row['against_hf']}", flush=True)
    path.write_text(to_json(made, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
