"""Compiled programs on disk: kept by default, whole, bounded, only the user's own, and as the user says."""

import os
import re
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import runs
from supra_jax.core import programs
from supra_jax.experiments import tiny
from tests.support import programs as support

KEPT = "Compiled programs are kept in "


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The user's cache directory, in a process that no directory was chosen for."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  before = {name: getattr(jax.config, name) for name in NAMES}
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path / "cache" / "supra_jax" / "programs"
  for name, value in before.items():
    jax.config.update(name, value)


NAMES = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")


def _write(path, size=100, age=0.0):
  """A program of an earlier start."""
  contents = programs.zstandard.ZstdCompressor().compress(os.urandom(size))
  path.write_bytes(contents)
  os.utime(path, (time.time() - age,) * 2)
  return contents


@pytest.mark.compat
def test_a_second_start_loads_what_the_first_compiled(tmp_path):
  model = tiny.write_checkpoint(tmp_path / "model", "supra")
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
  script = f"""
import jax, supra_jax
from supra_jax.core import programs
programs.MIN_SECONDS = 0.0  # a tiny model compiles in less than is worth keeping
loaded = []
jax.monitoring.register_event_listener(lambda name, **_: loaded.append(name.endswith("cache_hits")))
print(supra_jax.load({str(model)!r}).generate("The ", max_new_tokens=9), sum(loaded))
"""

  def start(*arguments):
    ran = subprocess.run(
      [sys.executable, *arguments], cwd=runs.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran

  root = tmp_path / "cache" / "supra_jax" / "programs"
  first, second = start("-c", script), start("-c", script)
  (text, hits), (again, more) = (ran.stdout.rsplit(" ", 1) for ran in (first, second))
  assert again == text and int(hits) == 0 and int(more) >= 3
  assert first.stderr.count(f"{KEPT}{root}, 2 GiB at most") == 1 and second.stderr == ""
  assert root.stat().st_mode & 0o777 == 0o700


def test_every_program_keeps_them(cache, tmp_path):
  ran = support.run("supra_jax.bin.generate", f"--checkpoint={tmp_path}/none", "--prompt=The")
  assert f"{KEPT}{cache}" in ran.stderr and cache.is_dir()


def test_the_user_chooses(cache, tmp_path, capsys):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  assert programs.keep_programs() is None and jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", False)
  assert programs.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
  assert not cache.exists() and capsys.readouterr().err == ""


def test_a_directory_that_others_may_write_to_is_not_used(cache, capsys):
  cache.mkdir(parents=True)
  cache.chmod(0o775)
  assert programs.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
  (cure,) = re.findall(r"others may write here\. Remove it, or: (.*)", capsys.readouterr().err)
  subprocess.run(cure, shell=True, check=True)
  assert programs.keep_programs().parent == cache


def test_no_directory_is_no_error(cache, monkeypatch, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert programs.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
  said = capsys.readouterr().err
  assert said.startswith("No compiled programs are kept: ") and "XDG_CACHE_HOME names another" in said


def test_a_relative_directory_is_ignored(cache, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("XDG_CACHE_HOME", "here")
  assert programs.keep_programs().parents[1] == tmp_path / "home" / ".cache" / "supra_jax"
  assert not (tmp_path / "here").exists()


def test_the_oldest_are_removed(cache):
  directory = programs.keep_programs()
  assert directory.parent == cache
  other = cache / "of_another_machine"
  other.mkdir()
  ages = {other / "old-cache": 300.0, directory / "middle-cache": 200.0, directory / "new-cache": 100.0}
  for path, age in ages.items():
    _write(path, 10_000, age)
  jax.config.update("jax_compilation_cache_dir", None)
  programs.keep_programs(max_bytes=25_000)
  assert [path.exists() for path in ages] == [False, True, True]


@pytest.mark.parametrize("damage", [lambda x: x[:-7], lambda x: b"", lambda x: b"!" + x[1:]])
def test_what_a_killed_process_wrote_half_is_removed(cache, damage):
  directory = programs.keep_programs()
  good, bad = directory / "good-cache", directory / "bad-cache"
  _write(good)
  bad.write_bytes(damage(_write(bad)))
  for path in (good, bad):
    later = time.time() + 5
    os.utime(path, (later, later))
  jax.config.update("jax_compilation_cache_dir", None)
  assert programs.keep_programs() == directory
  assert good.exists() and not bad.exists()


def test_another_cpu_has_other_programs(monkeypatch, tmp_path):
  names = []
  for features in ("sse avx", "sse avx", "sse avx avx512f"):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {features}\n")
    monkeypatch.setattr(programs, "_CPUS", tmp_path / "cpuinfo")
    names.append(programs._machine())
  assert names[0] == names[1] != names[2]
