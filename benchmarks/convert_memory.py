"""Memory and time of a conversion, beside those of copying the same files.

    python -m benchmarks.convert_memory --workdir=DIR [--layers=32]

Writes a random checkpoint of Mistral-7B's shapes (14.5 GB with 32 layers), and takes three times its size of the disk.
Files are out of the page cache before each measurement, and on the disk at the end of it.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks.machine import cpu_name
from supra_jax.bin.entry import run
from tests.convert_weights import random_checkpoint

MISTRAL_7B = {
  "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
  "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def forget(directory: Path) -> None:
  """Puts the files of a directory onto the disk and out of memory."""
  for path in directory.rglob("*"):
    if path.is_file():
      handle = os.open(path, os.O_RDONLY)
      os.fsync(handle)
      os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(handle)


def main() -> None:
  workdir = Path(_WORKDIR.value)
  source, output = workdir / "source", workdir / "output"
  workdir.mkdir(parents=True)
  try:
    size = random_checkpoint.write(source, num_hidden_layers=_LAYERS.value, **MISTRAL_7B).stat().st_size
    print(f"{size / 1e9:.1f} GB, {cpu_name()}, {os.cpu_count()} cores")
    convert = [sys.executable, "-m", "convert_weights.hf_to_orbax", f"--source={source}", f"--output={output}"]
    seconds = []
    for what, command in (("copy", ["cp", "-r", str(source), str(output)]), ("conversion", convert)):
      forget(source)
      began = time.monotonic()
      subprocess.run(command, check=True)
      forget(output)
      seconds.append(time.monotonic() - began)
      shutil.rmtree(output)
      peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
      print(f"{what}: {seconds[-1]:.1f} s, {seconds[-1] / seconds[0]:.2f} times the copy's; peak {peak:.2f} GiB")
  finally:
    shutil.rmtree(workdir)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", None, "Directory to make, and to remove at the end.", required=True)
  _LAYERS = flags.DEFINE_integer("layers", 32, "Of the model: 4 have 2.3 GB.", lower_bound=1)
  run(main)
