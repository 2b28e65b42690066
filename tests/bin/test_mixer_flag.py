"""A mixer and its fields on the command line."""

import pytest

from supra_jax.bin.mixer_flag import mixer_of, settings
from supra_jax.model.registry import layer


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("supra", layer("supra")),
    ("t2r:decay=none,rope=false,epsilon=0.01", layer("t2r", decay="none", rope=False, epsilon=0.01)),
    ("memory:retained=[32,0],window=9", layer("memory", retained=(32, 0), window=9)),
    ("mamba:time_step_rank=null", layer("mamba")),
  ],
)
def test_a_mixer(text, wanted):
  assert mixer_of(text) == wanted


@pytest.mark.parametrize(
  "text, said",
  [
    ("nope", "Unknown mixer 'nope': wanted one of softmax"),
    ("t2r:", "wanted NAME=VALUE"),
    ("t2r:decay", "decay: wanted NAME=VALUE"),
    ("t2r:decay=never", "decay='never': wanted one of 'lightning'"),
    ("t2r:window=3", r"--mixer=t2r:window=3: unknown keys \['window'\], missing keys \[\]. There are decay"),
    ("mamba:state_size=0", "state_size=0"),
  ],
)
def test_what_is_no_mixer(text, said):
  with pytest.raises(ValueError, match=said):
    mixer_of(text)


def test_settings():
  assert settings('a=1,b = x,c="x",d=true,e=f=g') == {"a": 1, "b": "x", "c": "x", "d": True, "e": "f=g"}
  assert settings("") == {} and settings("a=[0,1],b=2") == {"a": [0, 1], "b": 2}
