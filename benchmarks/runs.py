"""Runs of the real binary, in one process or several, with as many devices as a test wants; for benchmarks too."""

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
  """A run that takes seconds; `data` and `optimizer` may change in part."""
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


def losses(workdir: Path) -> dict[int, float]:
  """Step -> loss, as far as it is written."""
  path = workdir / "metrics.jsonl"
  return {r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r} if path.exists() else {}


def positions(workdir: Path) -> dict[int, int]:
  """Step -> rows read before it, of each training state on disk."""
  return {
    int(path.parent.parent.name): json.loads(path.read_text())["global_next_index"]
    for path in (workdir / "training").glob("[0-9]*/position/metadata")
    if path.parent.parent.name.isdigit()
  }


def cache_environment(directory: Path) -> dict[str, str]:
  """Environment of a process that keeps its compiled programs there, and finds those that others kept."""
  return {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def devices_environment(number: int) -> dict[str, str]:
  """Environment of a process that pretends to have so many devices; XLA's other flags are this process's."""
  return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}".strip()}


class Run:
  """`supra_jax.bin.train` as it is typed, started; what it says is collected.

  Attributes:
    processes: of the run.
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
    """Starts it.

    Args:
      config: written as a recipe.
      workdir: of the run.
      *flags: more of the command line.
      processes, devices: how many, and how many fake ones each has.
      cache: directory of compiled programs, which later runs need not compile.
      recipe: where it is written; None is beside the workdir.
    """
    recipe = recipe or Path(f"{workdir}_recipe.py")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(
      "import json\nimport ml_collections\n\n\ndef get_config():\n"
      f"  return ml_collections.ConfigDict(json.loads({to_json(dataclasses.asdict(config))!r}))\n"
    )
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
      # Read as it comes: a full pipe would stop the process.
      reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
      reader.start()
      self._said.append(lines)
      self._readers.append(reader)

  @property
  def said(self) -> str:
    """What all processes printed so far."""
    return "".join("".join(lines) for lines in self._said)

  def until(self, happened: Callable[[], bool], seconds: float = 240) -> None:
    """Waits until something happened; it has to while all processes live."""
    end = time.monotonic() + seconds
    while not happened():
      if any(process.poll() is not None for process in self.processes):
        # What one of them did last may not have been read yet.
        time.sleep(1)
        assert happened(), self.said
      assert time.monotonic() < end, self.said
      time.sleep(0.01)

  def until_step(self, workdir: Path, step: int) -> None:
    """Waits until the loss of a step is written."""
    self.until(lambda: max(losses(workdir), default=0) >= step)

  def send(self, number: signal.Signals, *which: int) -> None:
    """Sends a signal to some of the processes; to all if none is named."""
    for process in [self.processes[index] for index in which] if which else self.processes:
      process.send_signal(number)

  def wait(self, seconds: float = 300) -> list[int]:
    """Waits for the end, kills what has none, and returns exit statuses."""
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
    """Waits for a good end and returns what was said."""
    assert self.wait(seconds) == [0] * len(self.processes), self.said
    return self.said


def importable() -> dict[str, str]:
  """Environment of a process that finds this project's packages from any working directory."""
  return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def free_port() -> int:
  """A port of this machine that nothing listens at."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]
