"""Uptrains a model: `python -m supra_jax.bin.train --config=configs/FILE.py --workdir=DIR [--config.KEY=VALUE ...]`."""

from __future__ import annotations

import os
import sys
import time
import traceback

import jax
from absl import flags
from ml_collections import config_flags

from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation
from supra_jax.bin.recipe_help import describe
from supra_jax.core.preemption import SAVING_SECONDS, Preempted, at_once
from supra_jax.training.loop import TrainConfig, train

_BEGAN = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe of the run, as configs/FILE.py.", lock_config=True)
describe(_CONFIG, TrainConfig)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://; a run resumes.", required=True)
_EXTEND = flags.DEFINE_bool("extend", False, "Go on with a run that had fewer steps, to the recipe's num_steps.")
_BEFORE = "Save and end in time, SECONDS after the start, for which two steps and a minute are left; then status 75."
_SAVE_BEFORE = flags.DEFINE_integer("save_before", None, _BEFORE, lower_bound=int(SAVING_SECONDS) + 1)
_PROFILE_STEPS = flags.DEFINE_integer("profile_steps", 0, "Steps to trace into WORKDIR/profile.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Run as one of several processes (jax.distributed.initialize).")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "With --distributed: HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --distributed: number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --distributed: index of this process.", lower_bound=0)
flags.mark_flag_as_required("config")


def main() -> None:
  at_once()
  config = TrainConfig.from_mapping(_CONFIG.value.to_dict())
  if _DISTRIBUTED.value:
    try:
      jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except ValueError as error:
      needs = "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
      raise ValueError(f"--distributed: {error} Outside TPU pods and Slurm give {needs}.") from error
  try:
    steps, before = _PROFILE_STEPS.value, _SAVE_BEFORE.value and _BEGAN + _SAVE_BEFORE.value
    summary = train(config, _WORKDIR.value, profile_steps=steps, extend=_EXTEND.value, save_before=before)
  except Exception as error:
    if jax.process_count() == 1 or isinstance(error, Preempted):
      raise
    # Not an ordinary exit, which would wait for the other processes, while they wait for this one in a collective.
    said = f"error: {error}\n" if isinstance(error, ValueError | OSError) else traceback.format_exc()
    sys.stderr.write(f"Process {jax.process_index()}: {said}")
    sys.stderr.flush()
    os._exit(1)
  if jax.process_index() == 0:
    print(f"{summary.text} The model is in {_WORKDIR.value}/checkpoint.")


if __name__ == "__main__":
  run(with_implementation(main))
