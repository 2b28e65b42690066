"""Ways in which a layer that is linearised can begin, as data: for Python, the binary's flags and source.json alike."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from supra_jax.core.schema import POSITIVE, AtLeast, check
from supra_jax.linearization.solve import RIDGE
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig

MEASURED_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Start:
  """How a layer begins.

  Attributes:
    method: name of the start, as `--method` has it.
    phi: how feature maps begin: drawn at "random", or as the "identity", relu(x).
  """

  method: ClassVar[str]
  phi: ClassVar[Literal["random", "identity"]] = "identity"

  def __post_init__(self):
    check(self, type(self).__name__)

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """The mixer config of the layers that begin so.

    Args:
      mixer: what the user asked for; None means the default of this start.

    Raises:
      ValueError: the start is not for this mixer.
    """
    return SupraConfig() if mixer is None else mixer

  def to_json(self) -> dict[str, Any]:
    """The start as a JSON object, with its method."""
    return {"method": self.method, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Random(Start):
  """The paper's start: W and b of each feature map from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as the reference has it.

  Attributes:
    seed: a layer's draw depends on the seed and on the layer's number alone.
  """

  method = "random"
  phi = "random"
  seed: Annotated[int, AtLeast(0)] = 0


@dataclasses.dataclass(frozen=True)
class Identity(Start):
  """Feature maps relu(x): W = I and b = 0."""

  method = "identity"


@dataclasses.dataclass(frozen=True)
class Window(Start):
  """The teacher's softmax attention over the last tokens and the first few, with linear attention beside it.

  The linear attention adds 0 at first, so that the model predicts text at once; it trains from the first step on.

  Attributes:
    window, sinks: see `WindowConfig`.
  """

  method = "window"
  window: Annotated[int, POSITIVE] = WindowConfig.window
  sinks: Annotated[int, AtLeast(0)] = WindowConfig.sinks

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """A WindowConfig with this window; `mixer` says the rest, as a SupraConfig."""
    if mixer is not None and type(mixer) is not SupraConfig:
      raise ValueError(f"{self} makes supra_window layers of a SupraConfig, not of {mixer}: begin that by Identity().")
    rest = {field.name: getattr(mixer or SupraConfig(), field.name) for field in dataclasses.fields(SupraConfig)}
    return WindowConfig(**rest, window=self.window, sinks=self.sinks)


@dataclasses.dataclass(frozen=True)
class Calibrated(Start):
  """Feature maps relu(x), and output projections solved for by least squares on a text, layer by layer.

  With `keep_softmax` the layers are calibrated twice: so many of them, chosen by what is measured on the first student,
  stay softmax in the second.

  Attributes:
    data: directories that `prepare_data` packed, with weights, as `data.loading.parse_sources` reads them; or text, as
      `data.text.find_files` finds it, of which no more is read than is needed.
    text_key, sequence_length: of text.
    tokens: so many are read, rounded up to whole batches.
    batch_size: rows at a time; more where the mesh has more shards.
    ridge, mlp: as `calibrate` takes them.
    seed: of the order of packed rows.
    dtype: of the computation.
    keep_softmax: how many of the layers stay softmax: those that bring the calibrated student nearest to its teacher.
      None: no layer is kept on these grounds.
    measured_tokens: `keep_softmax` measures on so many further tokens.
  """

  method = "calibrated"
  data: str = "pydoc:topics"
  text_key: str = "text"
  sequence_length: Annotated[int, AtLeast(1)] = 512
  tokens: Annotated[int, AtLeast(1)] = 32768
  batch_size: Annotated[int, AtLeast(1)] = 8
  ridge: Annotated[float, AtLeast(0)] = RIDGE
  mlp: bool = True
  seed: Annotated[int, AtLeast(0)] = 0
  dtype: Literal["float32", "bfloat16", "float64"] = "float32"
  keep_softmax: int | None = None
  measured_tokens: Annotated[int, AtLeast(1)] = MEASURED_TOKENS


STARTS: dict[str, type[Start]] = {start.method: start for start in (Window, Calibrated, Identity, Random)}
