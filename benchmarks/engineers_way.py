"""Walks an engineer's whole way with random weights: from a release to an RNN with a bounded memory, and back.

    python -m benchmarks.engineers_way --workdir=DIR [--release=qwen3_0_6b] [--layers=2]

Draws Llama-3.2-1B-Instruct or Qwen3-0.6B as Hugging Face has it (`random_releases` says what is real of it), and types
the commands of README.md: convert, linearise, plan, pack conversations, uptrain by configs/chat_1b.py, evaluate,
answer, export, verify, and load the export in transformers. Each command is a process of its own. Needs no network, and
for Llama with all layers 20 GB of disk. Prints a table of seconds, peak memory and what came out, and writes JSON.
Losses are those of random weights: near the logarithm of the vocabulary's size.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from absl import flags

from benchmarks import random_releases, runs
from benchmarks.machine import described
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.data.chat_template import ChatTemplate

_TELLING = re.compile("^(fits|does not fit):|perplexity")


def write_conversations(release: random_releases.Release, path: Path) -> None:
  """Writes conversations about Python: `messages`, and the `text` that the chat template makes of them."""
  template = ChatTemplate(release.template, {"bos_token": release.tokenizer["bos_token"] or ""})
  lines = []
  for topic in sorted(topics):
    asked = {"role": "user", "content": f"What does Python's documentation say about {topic.lower()}?"}
    messages = [asked, {"role": "assistant", "content": topics[topic]}]
    lines.append(to_json({"messages": messages, "text": template.render(messages, reply=False)}) + "\n")
  path.write_text("".join(lines))


def commands(tokens: int) -> dict[str, str]:
  """Returns {step: what follows `python -m`}, to be run in the work directory in this order."""
  recipe = f"--config={runs.ROOT / 'configs' / 'chat_1b.py'}"
  short = (
    f"--config.data.sequence_length={tokens} --config.batch_size=2 --config.microbatches=2 --config.num_steps=3 "
    "--config.optimizer.warmup_steps=1 --config.data.heldout_rows=4 --config.evaluate_every=0 --config.save_every=0"
  )
  few = f"--max_tokens={4 * tokens}"
  model = "--checkpoint=runs/chat/checkpoint"
  drawn = f"--release={_RELEASE.value} --layers={_LAYERS.value} --narrower={_NARROWER.value}"
  return {
    "draw": f"benchmarks.random_releases --output=release {drawn}",
    "convert": "convert_weights.hf_to_orbax --source=release --output=models/teacher",
    "linearize": "supra_jax.bin.linearize --checkpoint=models/teacher --output=models/memory "
    f"--state_bytes={_STATE.value} --calibration_data=chat.jsonl --calibration_tokens={4 * tokens}",
    "plan": f"supra_jax.bin.plan {recipe} --mesh=fsdp:1 --device_memory=16GB",
    "pack": "supra_jax.bin.prepare_data --input=chat.jsonl --messages_key=messages --tokenizer=models/teacher "
    f"--output=data/chat --heldout_every=10 --sequence_length={tokens}",
    "train": f"supra_jax.bin.train {recipe} --workdir=runs/chat {short}",
    "evaluate": f"supra_jax.bin.evaluate {model} --input=pydoc:topics --sequence_length={tokens} {few}",
    "answer": f"supra_jax.bin.generate {model} --chat --prompt='What is an RNN?' --max_new_tokens=16",
    "export": "convert_weights.orbax_to_hf --source=runs/chat/checkpoint --output=models/shared",
    # Random weights attend to all tokens alike, so that rounding may decide which of two tokens a memory holds on.
    "verify": f"convert_weights.verify --source=models/shared {model} --tolerance=0.01",
    "load in transformers": f"benchmarks.load_export --export=models/shared {model}",
  }


def measure(command: str, workdir: Path) -> dict[str, Any]:
  """Runs a module with arguments; returns the command, seconds, peak resident memory in GB, and what came out.

  What came out is a verdict or a perplexity, else the last line that was printed, else the bytes that were written. The
  system counts the memory of this process, until it is replaced, as the other's: 0.3 GB are nothing.

  Raises:
    ValueError: the process failed; the message has the end of what it printed.
  """
  environment = {"JAX_COMPILATION_CACHE_DIR": str(workdir / "programs")} | runs.importable()
  # transformers keeps the code of a model that it loads, and asks the hub unless told otherwise.
  environment |= {"HF_HOME": str(workdir / "huggingface"), "HF_HUB_OFFLINE": "1"}
  arguments = ["-m", *shlex.split(command)]
  told = f"python -m {command}".replace(f"{runs.ROOT}/", "")
  logs = workdir / "stdout.txt", workdir / "stderr.txt"
  began = time.monotonic()
  with logs[0].open("wb") as stdout, logs[1].open("wb") as stderr:
    process = subprocess.Popen([sys.executable, *arguments], cwd=workdir, env=environment, stdout=stdout, stderr=stderr)
    _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  seconds = round(time.monotonic() - began, 1)
  printed, complained = (log.read_text(errors="replace") for log in logs)
  if process.returncode:
    raise ValueError(f"`{told}` ended with {process.returncode}:\n{printed[-2000:]}{complained[-4000:]}")
  lines = [line for line in printed.splitlines() if line.strip()]
  telling = [line for line in lines if _TELLING.search(line)]
  output = next((text.removeprefix("--output=") for text in arguments if text.startswith("--output=")), None)
  if not lines and output is not None:
    written = sum(path.stat().st_size for path in (workdir / output).rglob("*") if path.is_file())
    lines = [f"{written / 1e9:.2f} GB in {output}"]
  said = (telling or lines or [""])[-1]
  peak = round(usage.ru_maxrss * 1024 / 1e9, 2)
  return {"command": told, "seconds": seconds, "peak_gb": peak, "said": said}


def main() -> None:
  workdir, release = Path(_WORKDIR.value), random_releases.RELEASES[_RELEASE.value]
  workdir.mkdir(parents=True)
  recipe = {name: flags.FLAGS[name].value for name in ("release", "layers", "narrower", "tokens", "state_bytes")}
  result: dict[str, Any] = described() | recipe | {"steps": []}
  try:
    write_conversations(release, workdir / "chat.jsonl")
    print("| step | command | seconds | peak, GB | what came out |\n| --- | --- | ---: | ---: | --- |")
    for step, command in commands(_TOKENS.value).items():
      found = measure(command, workdir.absolute())
      result["steps"].append({"step": step} | found)
      print("|", " | ".join([step, f"`{found['command']}`", *map(str, list(found.values())[1:])]), "|", flush=True)
  finally:
    Path(_OUTPUT.value).write_text(to_json(result, indent=1) + "\n")
    if not _KEEP.value:
      shutil.rmtree(workdir)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory to make, and to remove at the end.", required=True)
  _RELEASE = flags.DEFINE_enum("release", "llama_3_2_1b", list(random_releases.RELEASES), "Release to draw.")
  _LAYERS = flags.DEFINE_integer("layers", 0, "Layers of the model. Default: as many as the release has.")
  _NARROWER = flags.DEFINE_integer("narrower", 1, "Divides the widths of the model, for a trial.", lower_bound=1)
  _TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of a row.", lower_bound=2)
  _STATE = flags.DEFINE_string("state_bytes", "8MB", "Size of the memory, as linearize takes it.")
  _KEEP = flags.DEFINE_bool("keep", False, "Leave the work directory where it is.")
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/engineers_way.json", "JSON file to write.")
  run(main)
