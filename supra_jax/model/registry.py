"""The mixers by name, as import strings: a config names a mixer before jax or the mixer's module is imported."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

# Name -> the module that registers it.
_MODULES = {
  "softmax": "supra_jax.model.mixers.softmax",
  "supra": "supra_jax.model.mixers.supra",
  "supra_window": "supra_jax.model.mixers.supra_window",
}
_CLASSES: dict[str, Any] = {}
MIXER = "self_attn"  # name of the mixer in a layer's parameters, Hugging Face's

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class MixerConfig:
  """What one layer's mixer is told; each mixer has a subclass of its own.

  Attributes:
    mixer: name of the mixer, which `register` sets on the subclass.
  """

  mixer: ClassVar[str]


def register(name: str) -> Callable[[_Class], _Class]:
  """Class decorator: enters a mixer under its name, and writes the name into its `Config`.

  Raises:
    ValueError: the mixer's `Config` is that of another mixer.
  """

  def enter(mixer: _Class) -> _Class:
    cls: Any = mixer
    if vars(cls.Config).get("mixer", name) != name:
      raise ValueError(f"{cls.__name__}.Config is that of the mixer {cls.Config.mixer!r}: wanted a class of its own.")
    cls.Config.mixer = name
    _CLASSES[name] = cls
    return mixer

  return enter


def mixer_names() -> tuple[str, ...]:
  """Names of all mixers, those that come with this package first."""
  return tuple(dict.fromkeys([*_MODULES, *_CLASSES]))


def mixer_class(name: str) -> Any:
  """The mixer of that name; imports its module the first time.

  Raises:
    ValueError: there is none.
  """
  if name not in _CLASSES and name in _MODULES:
    importlib.import_module(_MODULES[name])
  if name not in _CLASSES:
    raise ValueError(f"Unknown mixer {name!r}: wanted one of {', '.join(mixer_names())}.")
  return _CLASSES[name]


def mixer_classes() -> tuple[Any, ...]:
  """All mixers."""
  return tuple(mixer_class(name) for name in mixer_names())


def new_parameters(mixers: Iterable[str]) -> str:
  """Regex of the paths of the parameters that these mixers call new; "" where they have none."""
  return "|".join(f"{MIXER}/.*({new})" for new in dict.fromkeys(mixer_class(mixer).NEW for mixer in mixers) if new)


def takes_adapters(kernel: str) -> bool:
  """Whether the kernel of that path is a `Dense` one in all mixers, beside which an adapter can stand."""
  _, _, below = kernel.partition(f"{MIXER}/")
  return not any(re.search(mixer.NO_ADAPTERS, below) for mixer in mixer_classes() if mixer.NO_ADAPTERS)


def layer(mixer: str | MixerConfig, **fields: Any) -> MixerConfig:
  """The `Config` of a mixer: `layer("supra_window", window=128)`; a config is returned as it is, or with other fields.

  Raises:
    ValueError: there is no such mixer, or a field is out of range.
    TypeError: there is no such field.
  """
  if isinstance(mixer, MixerConfig):
    return dataclasses.replace(mixer, **fields)
  made: MixerConfig = mixer_class(mixer).Config(**fields)
  return made


def layers(mixers: Sequence[str], **fields: Any) -> tuple[MixerConfig, ...]:
  """A config for each name; of the fields each mixer takes those that its `Config` has.

  Raises:
    ValueError: there is no such mixer, a field is out of range, or no mixer has it.
  """
  own = {name: {field.name for field in dataclasses.fields(mixer_class(name).Config)} for name in mixers}
  if unknown := sorted(set(fields).difference(*own.values())):
    raise ValueError(f"No mixer of {', '.join(own)} has the fields {', '.join(unknown)}.")
  made = {name: layer(name, **{key: fields[key] for key in own[name] & fields.keys()}) for name in own}
  return tuple(made[name] for name in mixers)
