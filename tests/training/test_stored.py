"""Files that an earlier version wrote still do: models load, packed data verify, and stopped runs go on as they did.

`tests/golden/stored/make.py` made them. Bits depend on the CPU that a program was compiled for, and on how far it was
optimised, hence the tolerances; on the machine that made the files, optimised, the runs are equal to the last bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import supra_jax
from benchmarks import runs
from supra_jax.data import packed
from supra_jax.storage.model_directory import load_model
from supra_jax.training.config import TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics
from supra_jax.training.workdir import CONFIG_FILE, METRICS_FILE

STORED = Path(__file__).parent.parent / "golden" / "stored"
EXPECTED = json.loads((STORED / "expected.json").read_text())
# Norm of a parameter's difference over its own norm, and relative difference of a loss. bfloat16 rounds sums in the
# order that the compiler chose.
TOLERANCE = dict.fromkeys(EXPECTED, 1e-4) | {"bfloat16_moments": 1e-2}
# Each compiles a step and an evaluation of its own, 10 CPU seconds; these two cover groups, stages and microbatches.
QUICK = ("new_weights", "adapters")


@pytest.fixture(scope="module", autouse=True)
def files(quick_compilation, tmp_path_factory) -> Iterator[Path]:
  """Unpacks the files and goes there, since the paths in them are relative."""
  directory, before = tmp_path_factory.mktemp("files"), Path.cwd()
  with tarfile.open(STORED / "files.tar.xz") as archive:
    archive.extractall(directory, filter="data")
  os.chdir(directory / "stored")
  yield directory / "stored"
  os.chdir(before)


def test_models_load_and_give_the_stored_logits():
  stored = np.load(STORED / "logits.npz")
  for name in set(stored) - {"tokens"}:
    logits, _ = supra_jax.load(f"models/{name}")(stored["tokens"])
    np.testing.assert_allclose(logits, stored[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_packed_data_verify():
  for part in ("train", "heldout"):
    info = packed.verify(f"packed/{part}")
    assert (info.sequence_length, info.format_version) == (32, 2)
    assert json.loads(Path("packed", part, packed.META_FILE).read_text())["join"] == "separate"


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXPECTED]
)
def test_a_stopped_run_goes_on(name):
  workdir = Path("runs", name)
  values = json.loads((workdir / CONFIG_FILE).read_text())
  if values["mesh"]:
    command = ["-m", "supra_jax.bin.train", f"--config={workdir}_recipe.py", f"--workdir={workdir}"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, *command], env=runs.importable() | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
  else:
    del values["model"]
    train(TrainConfig.from_mapping(values), workdir)

  tolerance = TOLERANCE[name]
  records = read_metrics(workdir / METRICS_FILE)
  # Of a step of attention transfer there is no loss but that.
  losses = {str(r["step"]): r.get("loss", r.get("attention_error")) for r in records if "learning_rate" in r}
  assert losses == pytest.approx(EXPECTED[name]["losses"], rel=tolerance)
  heldout = [r["heldout_nll"] for r in records if "heldout_nll" in r]
  assert heldout == pytest.approx(EXPECTED[name]["heldout"], rel=tolerance)
  params = jax.tree_util.tree_leaves_with_path(load_model(workdir / "checkpoint").params)
  stored = np.load(STORED / f"{name}.npz")
  found = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in params}
  assert found.keys() == set(stored)
  for path, leaf in found.items():
    assert np.linalg.norm(leaf - stored[path]) <= tolerance * np.linalg.norm(stored[path]), path
