"""A checkpoint that is large beside a tensor of its own: memory, kills, a full disk, and reading by several devices."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import check_parameters, copy_case

from benchmarks import random_checkpoint, runs
from convert_weights.hf_to_orbax import convert
from supra_jax.core.files import temporary_directory
from supra_jax.storage.model_directory import load_model

MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp("large") / "source"
  weights = random_checkpoint.write(
    directory, model_type="llama", vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2,
  )  # fmt: skip
  yield directory
  weights.unlink()


@pytest.fixture(scope="module")
def converted(source):
  output = source.parent / "converted"
  convert(source, output)
  yield output
  for path in output.rglob("d/*"):
    path.unlink()


def program(source: Path, output: Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "convert_weights.hf_to_orbax", f"--source={source}", f"--output={output}"]
  return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def measured(code: str, *arguments: Path | str, **environment: str) -> list[int]:
  """The numbers that a program prints."""
  command = [sys.executable, "-c", code, *map(str, arguments)]
  done = subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
  return [int(line) for line in done.stdout.splitlines()]


def test_every_tensor_arrives(source, converted):
  check_parameters(load_model(converted).params, load_file(source / "model.safetensors"), tied=False)


# The first conversion loads all that conversions need.
MEMORY = """
import resource, sys
from convert_weights.hf_to_orbax import convert
peaks = []
for n in (1, 3):
  convert(sys.argv[n], sys.argv[n + 1])
  peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


def test_memory_is_that_of_a_few_tensors(source, tmp_path):
  size, small = (source / "model.safetensors").stat().st_size, copy_case("mistral_gqa", tmp_path / "small")
  (grown,) = measured(MEMORY, small, tmp_path / "small_out", source, tmp_path / "out")
  assert size > 240 * MIB and grown < 120 * MIB


READING = """
import re, sys
from supra_jax.storage.model_directory import load_model
from supra_jax.core.sharding import make_mesh
from supra_jax.model.placement import param_shardings

def bytes_read():
  return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])

for text in sys.argv[2:]:
  mesh, before = make_mesh(text), bytes_read()
  load_model(sys.argv[1], shardings=lambda shapes: param_shardings(shapes, mesh))
  print(bytes_read() - before)
"""


def test_devices_read_little_more_than_their_own_shards(converted, source):
  meshes = ("fsdp:4", "fsdp:2,tensor:2")
  read = measured(READING, converted, *meshes, **runs.devices_environment(4))
  # Each device reading all of it would be four times as much. What else a process reads, modules for one, varies.
  size = (source / "model.safetensors").stat().st_size
  assert [0.9 * size < bytes_read < 1.3 * size for bytes_read in read] == [True] * len(meshes), (size, read)


def test_killed_it_leaves_nothing_that_looks_whole_and_finishes_when_started_again(source, tmp_path):
  """Killed at once; started again, and killed amid the parameters."""
  output = tmp_path / "out"
  partial = temporary_directory(output)
  for written in (0, 60 * MIB):
    run = program(source, output)
    while not partial.exists() or sum(path.stat().st_size for path in partial.rglob("d/*")) < written:
      assert run.poll() is None
      time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
  convert(source, output)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  np.testing.assert_array_equal(
    load_model(output).params["lm_head"]["kernel"], load_file(source / "model.safetensors")["lm_head.weight"].T
  )


def test_a_full_disk_is_one_line_and_nothing_is_left(source, tmp_path):
  run = program(source, tmp_path / "out")
  resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (MIB, MIB))
  said = run.communicate()[1].replace("\r", "\n").strip().splitlines()
  assert run.returncode == 1
  errors = [line for line in said if not line.startswith("Converting,")]
  assert len(errors) == 1 and errors[0].startswith("error: The parameters could not be written: "), said
  assert list(tmp_path.iterdir()) == []
