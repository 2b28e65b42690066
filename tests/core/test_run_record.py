import json
import subprocess
import sys

import jax
import pytest

from supra_jax.core import run_record


def records(workdir):
  return [json.loads(line) for line in (workdir / run_record.RUNS_FILE).read_text().splitlines()]


def git(directory, *arguments):
  identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
  done = subprocess.run(["git", *identity, "-C", directory, *arguments], check=True, capture_output=True, text=True)
  return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A checkout with a commit, that `run_record` takes for its own."""
  root = tmp_path / "checkout"
  (root / "supra_jax").mkdir(parents=True)
  (root / "kernels_pallas").mkdir()
  (root / "supra_jax" / "__init__.py").write_text("")
  git(root, "init")
  git(root, "add", ".")
  git(root, "commit", "-m", "first")
  monkeypatch.setattr(run_record, "_SOURCE", root)
  return root


def test_a_line_each_start(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
  workdir = tmp_path / "new" / "run"
  for seed in (0, 1):
    run_record.write_run_record(workdir, {"seed": seed, "mixers": ("softmax", "supra")})
  first, second = records(workdir)
  assert first["config"] == {"seed": 0, "mixers": ["softmax", "supra"]}
  assert second["config"]["seed"] == 1
  assert first["time"] <= second["time"] and first["time"].endswith("+00:00")
  assert first["command"][1:] == sys.argv[1:] and sys.argv[0].endswith(first["command"][0])
  assert first["device"]
  assert first["python"] == ".".join(map(str, sys.version_info[:3]))
  assert first["packages"]["jax"] == jax.__version__
  assert all(first["packages"][name] for name in ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain"))
  assert first["platform"] == jax.default_backend()
  assert (first["device_kind"], first["devices"]) == (jax.devices()[0].device_kind, len(jax.devices()))
  assert first["processes"] == 1
  assert first["flags"] == {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false", "LIBTPU_INIT_ARGS": None}


def test_commit_of_a_checkout(checkout):
  run_record.write_run_record(checkout, {})
  (checkout / "supra_jax" / "new.py").write_text("")
  run_record.write_run_record(checkout, {})
  clean, modified = records(checkout)
  assert clean["commit"] == modified["commit"] == git(checkout, "rev-parse", "HEAD")
  # The record itself lies in the checkout, and is no change to the source.
  assert clean["modified"] is False
  assert modified["modified"] is True


def test_installed_inside_another_checkout(checkout, monkeypatch):
  installed = checkout / "venv" / "site-packages"
  (installed / "supra_jax").mkdir(parents=True)
  (installed / "supra_jax" / "__init__.py").write_text("")
  monkeypatch.setattr(run_record, "_SOURCE", installed)
  run_record.write_run_record(checkout, {})
  assert (records(checkout)[0]["commit"], records(checkout)[0]["modified"]) == (None, None)


def test_no_git(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  run_record.write_run_record(tmp_path, {})
  assert records(tmp_path)[0]["commit"] is None


def test_config_that_json_lacks(tmp_path):
  with pytest.raises(TypeError):
    run_record.write_run_record(tmp_path, {"value": object()})
  assert not (tmp_path / run_record.RUNS_FILE).exists()


def test_its_own_source_is_what_holds_the_packages():
  assert (run_record._SOURCE / "supra_jax" / "core" / "run_record.py").samefile(run_record.__file__)
