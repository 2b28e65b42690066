"""Starts `supra_jax.bin.train` in one process or several, with any number of fake devices; for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from supra_jax.core.plain_json import to_json
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.metrics import read_metrics
from supra_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parent.parent


def make_config(start: Path, text: str | Path, **changes) -> TrainConfig:
  """Makes the config of a run that takes seconds.

  Args:
    start: model directory to start from.
    text: text to pack, as `data.text.find_files` takes it.
    **changes: fields to change; `data` and `optimizer` are dicts of their fields to change.
  """
  values = {
    "init_checkpoint": str(start),
    "data": {"input": str(text), "sequence_length": 64, "heldout_every": 6, "heldout_rows": 8},
    "optimizer": {"learning_rate": 1e-2, "end_learning_rate": 1e-3, "warmup_steps": 3},
    "batch_size": 4,
    "num_steps": 12,
    "log_every": 1,
    "save_every": 0,
  }
  for name, value in changes.items():
    values[name] = values[name] | value if isinstance(value, dict) else value
  data, optimizer = DataConfig(**values.pop("data")), OptimizerConfig(**values.pop("optimizer"))
  return TrainConfig(**values, data=data, optimizer=optimizer)


def write_recipe(config: TrainConfig, path: Path) -> Path:
  """Writes a recipe, as `--config` takes it, of a config, and returns its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "import json\nimport ml_collections\n\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict(json.loads({to_json(dataclasses.asdict(config))!r}))\n"
  )
  return path


def losses(workdir: Path) -> dict[int, float]:
  """Returns {step: loss} of the losses written so far."""
  path = workdir / "metrics.jsonl"
  return {r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r} if path.exists() else {}


def positions(workdir: Path) -> dict[int, int]:
  """Returns {step: number of rows read up to that step} of the training states on disk."""
  return {
    int(path.parent.parent.name): json.loads(path.read_text())["global_next_index"]
    for path in (workdir / "training").glob("[0-9]*/position/metadata")
    if path.parent.parent.name.isdigit()
  }


def cache_environment(directory: Path) -> dict[str, str]:
  """Environment variables that make a process read and write compiled programs in a directory."""
  return {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def devices_environment(number: int) -> dict[str, str]:
  """Environment of a process that pretends to have so many devices; XLA's other flags are this process's."""
  return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}".strip()}


class Run:
  """A run of `supra_jax.bin.train` on its command line, whose output is collected.

  Attributes:
    processes: the processes of the run.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: Path | str,
    *flags: str,
    processes: int = 1,
    devices: int = 1,
    cache: Path | None = None,
    recipe: Path | None = None,
  ):
    """Starts the run.

    Args:
      config: config of the run, which is written to a recipe.
      workdir: directory of the run.
      *flags: further flags.
      processes: number of processes.
      devices: number of fake CPU devices of each process.
      cache: directory of compiled programs, shared with other runs.
      recipe: file to write the recipe to; None means a file beside the workdir.
    """
    recipe = write_recipe(config, recipe or Path(f"{workdir}_recipe.py"))
    command = [sys.executable, "-m", "supra_jax.bin.train", f"--config={recipe}", f"--workdir={workdir}", *flags]
    if processes > 1:
      command += ["--distributed", f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"]
    environment = os.environ | devices_environment(devices)
    if cache:
      environment |= cache_environment(cache)
    self._said: list[list[str]] = []
    self._readers: list[threading.Thread] = []
    self.processes = [
      subprocess.Popen(
        command + [f"--process_id={number}"] * (processes > 1),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for number in range(processes)
    ]
    for process in self.processes:
      lines: list[str] = []
      # Read while the process runs, since a full pipe would stop it.
      reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
      reader.start()
      self._said.append(lines)
      self._readers.append(reader)

  @property
  def said(self) -> str:
    """All that the processes have printed so far."""
    return "".join("".join(lines) for lines in self._said)

  def until(self, happened: Callable[[], bool], seconds: float = 240) -> None:
    """Waits until `happened()` is true; fails if a process ends first, or after `seconds`."""
    end = time.monotonic() + seconds
    while not happened():
      if any(process.poll() is not None for process in self.processes):
        # The last output of the process may not have been read yet.
        time.sleep(1)
        assert happened(), self.said
      assert time.monotonic() < end, self.said
      time.sleep(0.01)

  def until_step(self, workdir: Path, step: int) -> None:
    """Waits until the loss of step `step` is written."""
    self.until(lambda: max(losses(workdir), default=0) >= step)

  def send(self, number: signal.Signals, *which: int) -> None:
    """Sends a signal to the processes with the indices `which`, or to all if there are none."""
    for process in [self.processes[index] for index in which] if which else self.processes:
      process.send_signal(number)

  def wait(self, seconds: float = 300) -> list[int]:
    """Waits for the processes to end, kills those that have not after `seconds`, and returns the exit statuses."""
    end = time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(max(end - time.monotonic(), 0.1))
    finally:
      for process, reader in zip(self.processes, self._readers, strict=True):
        process.kill()
        process.wait()
        reader.join()
    return [process.returncode for process in self.processes]

  def finish(self, seconds: float = 300) -> str:
    """Waits for the processes, checks that all succeeded, and returns what they printed."""
    assert self.wait(seconds) == [0] * len(self.processes), self.said
    return self.said


def importable() -> dict[str, str]:
  """Environment variables with which a process finds this project's packages from any working directory."""
  return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def free_port() -> int:
  """Returns the number of a free TCP port."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]
