"""Time from a cold start to generated text, and where it goes: `python -m benchmarks.first_token --checkpoint=DIR`.

Each start is a process of its own, and generates the same text twice. The first start finds no compiled programs on
disk, the second those of the first. With --torch a third start has transformers read the same model.

    import    of the package
    load      of the parameters and the tokenizer
    compile   what the first text took longer than the second
    prefill   until the first token of the second text
    decode    its other tokens

Seconds of wall clock, and of CPU on all threads. Writes first_token_<CPU>.json.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.machine import described
from benchmarks.runs import ROOT
from kernels_pallas.verdict import slug
from supra_jax.core.plain_json import to_json

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory.", required=True)
_TORCH = flags.DEFINE_string("torch", "", "The model exported for transformers. Empty: not timed.")
_PROMPT = flags.DEFINE_string("prompt", "The capital of France is", "Text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 50, "Number of tokens to generate.", lower_bound=2)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Directory of the JSON.")

STAGES = ("import", "load", "compile", "prefill", "decode")
_COMMON = """
import json, resource, sys, time
path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def now():
  used = resource.getrusage(resource.RUSAGE_SELF)
  return [time.monotonic(), used.ru_utime + used.ru_stime]
marks = [[float(sys.argv[4]), 0.0]]
"""
OURS = f"""{_COMMON}
import jax, supra_jax
marks.append(now())
model = supra_jax.load(path)
jax.block_until_ready(model.params)
marks.append(now())
for _ in range(2):
  pieces = model.stream(prompt, max_new_tokens=count, temperature=0.0)
  text = next(pieces)
  marks.append(now())
  text += "".join(pieces)
  marks.append(now())
print(json.dumps([text, marks]))
"""
TORCH = f"""{_COMMON}
import torch, transformers
marks.append(now())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
marks.append(now())
class Marks(transformers.generation.streamers.BaseStreamer):
  def put(self, value):
    self.calls += 1
    if self.calls == 2:  # the first call has the prompt
      marks.append(now())
  def end(self):
    marks.append(now())
ids = tokenizer(prompt, return_tensors="pt")
for _ in range(2):
  streamer = Marks()
  streamer.calls = 0
  with torch.no_grad():
    new = model.generate(**ids, max_new_tokens=count, do_sample=False, streamer=streamer)
print(json.dumps([tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True), marks]))
"""


def start(script: str, path: str, environment: dict[str, str]) -> dict[str, Any]:
  """One start: its text, and for each stage and for all until the end of the first text [wall, CPU] seconds."""
  arguments = [sys.executable, "-c", script, path, _PROMPT.value, str(_TOKENS.value), str(time.monotonic())]
  ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  if ran.returncode:
    raise RuntimeError(ran.stderr)
  text, marks = json.loads(ran.stdout.splitlines()[-1])
  spans = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]
  imported, loaded, first, rest, prefill, decode = spans
  compiled = [sum(column) for column in zip(first, rest, [-x for x in prefill], [-x for x in decode], strict=True)]
  total = [sum(column) for column in zip(imported, loaded, first, rest, strict=True)]
  return {"text": text, **dict(zip(STAGES, (imported, loaded, compiled, prefill, decode), strict=True)), "total": total}


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as cache:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment["XDG_CACHE_HOME"] = cache
    starts = {name: start(OURS, _CHECKPOINT.value, environment) for name in ("first start", "second start")}
    if _TORCH.value:
      starts["transformers"] = start(TORCH, _TORCH.value, environment)
  print(f"| {'seconds, wall and CPU':<21} | {' | '.join(f'{name:>14}' for name in starts)} |")
  print(f"| --- | {' | '.join('---:' for _ in starts)} |")
  for stage in (*STAGES, "total"):
    cells = (f"{wall:6.2f} {cpu:7.2f}" for wall, cpu in (found[stage] for found in starts.values()))
    print(f"| {stage:<21} | {' | '.join(cells)} |")
  for name, found in starts.items():
    print(f"{name}: {found['text']!r}")
  machine = described()
  what = {"prompt": _PROMPT.value, "tokens": _TOKENS.value, "starts": starts}
  Path(_OUTPUT.value).mkdir(parents=True, exist_ok=True)
  Path(_OUTPUT.value, f"first_token_{slug(machine['device'])}.json").write_text(
    to_json(machine | what, indent=2) + "\n"
  )


if __name__ == "__main__":
  app.run(main)
