"""Measures memory and time of a conversion, and compares its time with that of copying the same files.

    python -m benchmarks.convert_memory --workdir=DIR [--layers=32] [--rounds=3]

Writes a random checkpoint with Mistral-7B's shapes (14.5 GB with 32 layers), and needs three times its size on disk.
Before each measurement the files are dropped from the page cache; the time includes syncing the output to disk.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks import random_checkpoint
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.core.run_record import cpu_name

MISTRAL_7B = {
  "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
  "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def forget(directory: Path) -> None:
  """Syncs the files of a directory to disk, and drops them from the page cache."""
  for path in directory.rglob("*"):
    if path.is_file():
      handle = os.open(path, os.O_RDONLY)
      os.fsync(handle)
      os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(handle)


def measure(command: list[str], source: Path, output: Path) -> tuple[float, float]:
  """Runs a command that reads `source` and writes `output`, then removes `output`.

  Returns:
    (seconds until the output is on the disk, peak resident memory of the command in GB).
  """
  forget(source)
  began = time.monotonic()
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command)
  forget(output)
  seconds = time.monotonic() - began
  shutil.rmtree(output)
  return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
  workdir = Path(_WORKDIR.value)
  source, output = workdir / "source", workdir / "output"
  workdir.mkdir(parents=True)
  copy = ["cp", "-r", str(source), str(output)]
  convert = [sys.executable, "-m", "convert_weights.hf_to_orbax", f"--source={source}", f"--output={output}"]
  try:
    size = random_checkpoint.write(source, num_hidden_layers=_LAYERS.value, **MISTRAL_7B).stat().st_size
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {**machine, "source_gb": round(size / 1e9, 2), "rounds": []}
    for _ in range(_ROUNDS.value):
      # The peak of cp is meaningless: until exec, the system counts the memory of this process.
      copy_seconds, _ = measure(copy, source, output)
      seconds, peak = measure(convert, source, output)
      times = {"copy_seconds": copy_seconds, "seconds": seconds, "ratio": seconds / copy_seconds, "peak_gb": peak}
      result["rounds"].append({name: round(x, 2) for name, x in times.items()})
      print(result["rounds"][-1], flush=True)
    Path(_OUTPUT.value).write_text(to_json(result, indent=1) + "\n")
  finally:
    shutil.rmtree(workdir)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory to make, and to remove at the end.", required=True)
  _LAYERS = flags.DEFINE_integer("layers", 32, "Layers of the model: 4 layers are 2.3 GB.", lower_bound=1)
  _ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of copy and conversion, in turn.", lower_bound=1)
  _OUTPUT = flags.DEFINE_string("output", "benchmarks/results/convert_memory.json", "JSON file to write.")
  run(main)
