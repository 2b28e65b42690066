"""Registry of the mixers by name; a mixer's module, and with it jax, is imported when the mixer is first asked for."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

# Name of a mixer -> the module that registers the mixer.
_MODULES = {
  "softmax": "supra_jax.model.mixers.softmax",
  "supra": "supra_jax.model.mixers.supra",
  "supra_window": "supra_jax.model.mixers.supra_window",
  "memory": "supra_jax.model.mixers.memory",
  "lolcats": "supra_jax.model.mixers.lolcats",
  "t2r": "supra_jax.model.mixers.t2r",
  "linear_transformer": "supra_jax.model.mixers.linear_transformer",
  "mamba": "supra_jax.model.mixers.mamba",
}
_CLASSES: dict[str, Any] = {}
MIXER = "self_attn"  # name of the mixer in a layer's parameters, as in Hugging Face's models

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class MixerConfig:
  """Config of the mixer of one layer; each mixer has its own subclass.

  Attributes:
    mixer: name of the mixer, which `register` sets on the subclass.
  """

  mixer: ClassVar[str]

  @property
  def alike(self) -> MixerConfig:
    """The config without what layers of one stack may differ in: parameters do not, nor do other mixers' layers."""
    return self


def register(name: str) -> Callable[[_Class], _Class]:
  """Returns a class decorator that registers a mixer under `name`, and sets `mixer` of the mixer's `Config` to `name`.

  Raises:
    ValueError: (the decorator) the mixer's `Config` is that of another mixer.
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
  """Returns the names of all mixers, those that come with this package first."""
  return tuple(dict.fromkeys([*_MODULES, *_CLASSES]))


def mixer_class(name: str) -> Any:
  """Returns the class of a mixer, given its name; imports the mixer's module the first time.

  Raises:
    ValueError: there is no mixer of that name.
  """
  if name not in _CLASSES and name in _MODULES:
    importlib.import_module(_MODULES[name])
  if name not in _CLASSES:
    raise ValueError(f"Unknown mixer {name!r}: wanted one of {', '.join(mixer_names())}.")
  return _CLASSES[name]


def mixer_classes() -> tuple[Any, ...]:
  """Returns the classes of all mixers."""
  return tuple(mixer_class(name) for name in mixer_names())


def new_parameters(mixers: Iterable[str]) -> str:
  """Returns a regex found in the paths of the new parameters (`Mixer.NEW`) of these mixers; "" if there are none."""
  return "|".join(f"{MIXER}/.*({new})" for new in dict.fromkeys(mixer_class(mixer).NEW for mixer in mixers) if new)


def takes_adapters(kernel: str) -> bool:
  """Whether the kernel at a path can have adapters: whether its path below the mixer matches no mixer's NO_ADAPTERS."""
  _, _, below = kernel.partition(f"{MIXER}/")
  return not any(re.search(mixer.NO_ADAPTERS, below) for mixer in mixer_classes() if mixer.NO_ADAPTERS)


def layer(mixer: str | MixerConfig, **fields: Any) -> MixerConfig:
  """Returns the config of a layer, as in `layer("supra_window", window=128)`.

  Args:
    mixer: name of a mixer, or a config.
    **fields: fields of the mixer's `Config`; the others keep their defaults, or their values in the given config.

  Raises:
    ValueError: there is no such mixer, or a field is out of range.
    TypeError: the config has no such field.
  """
  if isinstance(mixer, MixerConfig):
    return dataclasses.replace(mixer, **fields)
  made: MixerConfig = mixer_class(mixer).Config(**fields)
  return made


def layers(mixers: Sequence[str], **fields: Any) -> tuple[MixerConfig, ...]:
  """Returns the configs of layers, one per name in `mixers`.

  Args:
    mixers: names of mixers.
    **fields: fields of the mixers' configs; a config gets those fields that it has.

  Raises:
    ValueError: there is no such mixer, a field is out of range, or none of the configs has a field.
  """
  own = {name: {field.name for field in dataclasses.fields(mixer_class(name).Config)} for name in mixers}
  if unknown := sorted(set(fields).difference(*own.values())):
    raise ValueError(f"No mixer of {', '.join(own)} has the fields {', '.join(unknown)}.")
  made = {name: layer(name, **{key: fields[key] for key in own[name] & fields.keys()}) for name in own}
  return tuple(made[name] for name in mixers)
