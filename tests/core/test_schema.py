"""Fields say what they may hold; what they must not hold is named as its user typed it."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from supra_jax.core.schema import POSITIVE, AtLeast, AtMost, check, from_mapping


@dataclasses.dataclass(frozen=True)
class Part:
  kind: Literal["a", "b"] = "a"
  share: Annotated[float, AtLeast(0), AtMost(1), "of the whole"] = 0.5

  def __post_init__(self):
    check(self, "part")


@dataclasses.dataclass(frozen=True)
class Whole:
  count: Annotated[int, AtLeast(1)]
  rate: Annotated[float, POSITIVE] = 1.0
  most: Annotated[int, AtLeast(0)] | None = None
  kinds: tuple[Literal["a", "b"], ...] = ()
  free: int = 0
  part: Part = Part()

  def __post_init__(self):
    check(self)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"count": 0}, "count=0: wanted a whole number, 1 or more."),
    ({"count": 2.0}, "count=2.0: wanted a whole number, 1 or more."),
    ({"count": True}, "count=True: wanted a whole number, 1 or more."),
    ({"count": 1, "rate": 0}, "rate=0: wanted a positive finite number."),
    ({"count": 1, "rate": math.inf}, "rate=inf: wanted a positive finite number."),
    ({"count": 1, "rate": math.nan}, "rate=nan: wanted a positive finite number."),
    ({"count": 1, "rate": "1"}, "rate='1': wanted a positive finite number."),
    ({"count": 1, "most": -1}, "most=-1: wanted a whole number, 0 or more."),
    ({"count": 1, "kinds": ("a", "c")}, "kinds holds 'c': wanted one of 'a', 'b'."),
  ],
)
def test_what_must_not_be_is_named(values, message):
  with pytest.raises(ValueError) as refused:
    Whole(**values)
  assert str(refused.value) == message


def test_a_part_is_named_with_its_path():
  with pytest.raises(ValueError, match=r"^part\.kind='c': wanted one of 'a', 'b'\.$"):
    from_mapping(Whole, {"count": 1, "part": {"kind": "c"}}, "config")
  with pytest.raises(
    ValueError, match=r"^part\.share=2\.0: wanted a finite number, 0 or more, 1 at most \(of the whole"
  ):
    from_mapping(Whole, {"count": 1, "part": {"share": 2}}, "config")


def test_what_may_be_is_read():
  values = {"count": 3, "rate": 2, "most": None, "kinds": ["a", "b"], "part": {"share": 1}}
  assert from_mapping(Whole, values, "config") == Whole(3, 2.0, None, ("a", "b"), 0, Part(share=1.0))
  with pytest.raises(ValueError, match=r"config: count: wanted int, got 3\.0"):
    from_mapping(Whole, {"count": 3.0}, "config")
