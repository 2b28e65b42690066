"""A run keeps to the kernels that it began with."""

import json

import pytest

from benchmarks.runs import make_config
from kernels_pallas import api, verdict
from supra_jax.core.files import place
from supra_jax.training.loop import train
from supra_jax.training.workdir import KERNELS_FILE, kernels_of_run

pytestmark = pytest.mark.usefixtures("quick_compilation")
# A choice for the device that is here.
RECURRENT = (verdict.Choice("cpu", "float32", (1, 256), 1, "recurrent"),)


def test_a_run_keeps_what_it_began_with(start, text, tmp_path, monkeypatch):
  called = []

  def recurrent(*args, **kwargs):
    called.append(len(args))
    return api.reference.recurrent(*args, **kwargs)

  monkeypatch.setitem(api.IMPLEMENTATIONS, "recurrent", recurrent)
  monkeypatch.setattr(verdict, "of_this_device", lambda: RECURRENT)
  train(make_config(start, text, num_steps=1, data={"sequence_length": 48}), tmp_path / "run")
  assert called and verdict.in_force() == RECURRENT and verdict.used() is None
  assert json.loads((tmp_path / "run" / KERNELS_FILE).read_text()) == json.loads(
    json.dumps({"cpu": verdict.to_json(RECURRENT)})
  )

  workdir = place(tmp_path / "run")
  monkeypatch.setattr(verdict, "of_this_device", lambda: ())
  assert kernels_of_run(workdir) == RECURRENT
  with verdict.using("chunked_xla"):
    assert kernels_of_run(workdir) == "chunked_xla"
  assert kernels_of_run(workdir) == RECURRENT
  # On a device of another kind it begins anew, and keeps to that too.
  monkeypatch.setattr(verdict, "device", lambda: ("NVIDIA H100", "cuda"))
  assert kernels_of_run(workdir) == ()
  monkeypatch.setattr(verdict, "of_this_device", lambda: RECURRENT)
  assert kernels_of_run(workdir) == ()
  (workdir / KERNELS_FILE).write_text('{"NVIDIA H100": 3}')
  with pytest.raises(ValueError, match=r"kernels.json: 3: wanted choices of kernels. Remove it to choose"):
    kernels_of_run(workdir)


def test_a_named_implementation_is_what_the_run_began_with(tmp_path):
  with verdict.using("reference"):
    assert kernels_of_run(place(tmp_path)) == "reference"
  assert kernels_of_run(place(tmp_path)) == "reference"
