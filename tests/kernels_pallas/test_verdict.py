"""Verdicts on kernels: which implementation "auto" is, on devices that are not here too."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import runs
from kernels_pallas import linear_attention, verdict
from kernels_pallas.api import choose_implementations
from supra_jax.core.bucket import cache_directory
from tests.kernels_pallas import cross

X = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
KIND = "NVIDIA H100"
TRITON = verdict.Choice("cuda", "bfloat16", (16, 64), 64, "triton")
NO_KERNEL, KERNEL = (("default", "chunked_xla"),), (("default", "chunked_xla"), ("cuda", "triton"))


def _forget():
  verdict._read.cache_clear()
  verdict._say.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A user's cache directory without verdicts."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  _forget()
  yield tmp_path
  _forget()


def _auto(x=X):
  with cross.h100():
    return choose_implementations("auto", x, x, x)


def test_without_one_auto_takes_no_kernel_and_says_so_once(capsys):
  assert _auto() == _auto() == NO_KERNEL
  said = capsys.readouterr().err
  assert said.count(f"{KIND}: linear attention runs without kernels") == said.count("supra_jax.bin.doctor") == 1


def test_with_one_auto_obeys_it(capsys):
  path = verdict.write(KIND, (TRITON,), {"found": []})
  assert path.parent == verdict.directory() == cache_directory() / "verdicts"
  assert path.parent.stat().st_mode & 0o777 == 0o700
  assert _auto() == KERNEL
  for shape, dtype in (((1, 63, 1, 64), jnp.bfloat16), ((1, 64, 1, 65), jnp.bfloat16), ((1, 64, 1, 64), jnp.float32)):
    assert _auto(jax.ShapeDtypeStruct(shape, dtype)) == NO_KERNEL
  assert capsys.readouterr().err == ""
  # That nothing was found to be right is a verdict too.
  verdict.write(KIND, (), {"found": []})
  assert _auto() == NO_KERNEL and capsys.readouterr().err == ""


def test_it_is_of_one_device_and_of_these_versions(monkeypatch):
  verdict.write("NVIDIA H200", (TRITON,), {})
  assert _auto() == NO_KERNEL
  verdict.write(KIND, (TRITON,), {})
  assert _auto() == KERNEL
  these = verdict.versions()
  for name in these:
    with monkeypatch.context() as patch:
      patch.setattr(verdict, "versions", lambda name=name: these | {name: "another"})
      _forget()
      assert _auto() == NO_KERNEL, name
  assert {"jax", "jaxlib", "kernels_pallas"} <= these.keys()


@pytest.mark.parametrize(
  "contents", ["", "{", "[]", '{"choices": 3}', '{"choices": [{"platform": "cuda"}]}', '{"choices": "triton"}']
)
def test_a_damaged_one_is_none_and_is_named(contents, capsys):
  path = verdict.write(KIND, (TRITON,), {})
  path.write_text(contents)
  _forget()
  assert _auto() == NO_KERNEL
  assert f"{path}: this verdict on kernels cannot be read" in capsys.readouterr().err


def test_what_is_used_goes_before_it(capsys):
  with verdict.using((TRITON,)):
    assert _auto() == KERNEL
    with verdict.using("recurrent"):
      assert _auto() == (("default", "recurrent"),)
    with verdict.using("triton"), pytest.raises(NotImplementedError, match="'triton' cannot serve"):
      x = jnp.ones((1, 2, 1, 257))
      linear_attention(x, x, x, jnp.ones(1), scale=1.0)
    assert _auto() == KERNEL
  assert capsys.readouterr().err == ""
  assert _auto() == NO_KERNEL


def test_an_implementation_of_another_release_is_passed_over():
  verdict.write(KIND, (TRITON._replace(implementation="quicker"), TRITON), {})
  assert _auto() == KERNEL


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from kernels_pallas import verdict
from tests.kernels_pallas import cross
with cross.h100():
  own, alone = verdict.of_this_device(), verdict.in_force()
print(json.dumps([verdict.to_json(x) for x in (own, alone, verdict.agreed(own), verdict.agreed("triton"))]))
"""


def test_of_several_processes_the_first_ones_is_everybodys(tmp_path, monkeypatch):
  address, ran = f"localhost:{runs.free_port()}", []
  for number, choices in enumerate([(TRITON,), None]):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
    if choices is not None:
      verdict.write(KIND, choices, {})
    command = [sys.executable, "-c", PROCESS, address, str(number)]
    ran.append(subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True))
  kernels = verdict.to_json((TRITON,))
  own = [kernels, []]
  for number, process in enumerate(ran):
    out, _ = process.communicate(timeout=100)
    # Alone, none dares to obey its own.
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps([own[number], [], kernels, "triton"]))
