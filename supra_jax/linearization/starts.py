"""Starts: how the new parameters of linearised layers are initialised, as dataclasses.

The fields of a start are arguments in Python, flags of `supra_jax.bin.linearize` and keys in source.json alike.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from supra_jax.core.schema import POSITIVE, AtLeast, check
from supra_jax.linearization.solve import RIDGE
from supra_jax.model.mixers.lolcats import LolcatsConfig
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.registry import MixerConfig

MEASURED_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Start:
  """How the new parameters of a layer are initialised.

  Attributes:
    method: name of the start, the value of the flag `--method`.
    phi: initial feature maps: "random" draws their W and b; "identity" is phi(x) = relu(x).
    own_mixer: whether its layers are of the mixer that is named as its method, and of no other.
  """

  method: ClassVar[str]
  phi: ClassVar[Literal["random", "identity"]] = "identity"
  own_mixer: ClassVar[bool] = False

  def __post_init__(self):
    check(self, type(self).__name__)

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """Returns the mixer config of the layers that begin with this start.

    Args:
      mixer: the mixer config that the user asked for; None means the default of this start.

    Raises:
      ValueError: the start is not for this mixer.
    """
    return SupraConfig() if mixer is None else mixer

  def _makes_its_own(self, mixer: MixerConfig | None) -> None:
    """Raises ValueError if the user asked for a mixer: layers of this start are of the mixer named as its method."""
    if mixer is not None:
      raise ValueError(f"{self} makes {self.method} layers, not such of {mixer}: begin those by Identity().")

  def to_json(self) -> dict[str, Any]:
    """Returns the start as a JSON object: its fields and `method`."""
    return {"method": self.method, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Random(Start):
  """The paper's start: W and b of each feature map drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as in the reference.

  Attributes:
    seed: seeds the draws; those of a layer depend on the seed and on the layer's number alone.
  """

  method = "random"
  phi = "random"
  seed: Annotated[int, AtLeast(0)] = 0


@dataclasses.dataclass(frozen=True)
class Identity(Start):
  """Feature maps that start as phi(x) = relu(x): W = I and b = 0."""

  method = "identity"


@dataclasses.dataclass(frozen=True)
class Window(Start):
  """The teacher's softmax attention over the last W and the first N tokens, plus linear attention over all tokens.

  The output of the linear attention is 0 before training, so that the model predicts text at once. The parameters of
  the linear attention train from the first step on.

  Attributes:
    window: W, see `WindowConfig`.
    sinks: N, see `WindowConfig`.
  """

  method = "window"
  window: Annotated[int, POSITIVE] = WindowConfig.window
  sinks: Annotated[int, AtLeast(0)] = WindowConfig.sinks

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """Returns a WindowConfig with this start's window and sinks, and the other fields of the SupraConfig `mixer`.

    Raises:
      ValueError: `mixer` is neither a SupraConfig nor None.
    """
    if mixer is not None and type(mixer) is not SupraConfig:
      raise ValueError(
        f"method=window makes supra_window layers of the mixer supra, not of {mixer.mixer}: method=identity and "
        "method=random take any."
      )
    rest = {field.name: getattr(mixer or SupraConfig(), field.name) for field in dataclasses.fields(SupraConfig)}
    return WindowConfig(**rest, window=self.window, sinks=self.sinks)


@dataclasses.dataclass(frozen=True)
class Lolcats(Start):
  """LoLCATs' layer (mixer `lolcats`), for comparison with the others: see `LolcatsAttention`.

  Feature maps begin with W = I. LoLCATs trains them first, by attention transfer (`TrainConfig.transfer_steps`).

  Attributes:
    window: W, see `LolcatsConfig`.
  """

  method = "lolcats"
  own_mixer = True
  window: Annotated[int, POSITIVE] = LolcatsConfig.window

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """Returns a LolcatsConfig with this start's window.

    Raises:
      ValueError: `mixer` is given.
    """
    self._makes_its_own(mixer)
    return LolcatsConfig(self.window)


@dataclasses.dataclass(frozen=True)
class Reading(Start):
  """A start that reads a text.

  Attributes:
    data: directories that `prepare_data` packed, with weights, as `data.loading.parse_sources` takes them; or a glob of
      text files, as `data.text.find_files` takes it. No more of the text is read than is needed.
    text_key: the key of JSON lines, or the column of parquet files, that holds the text; unused for packed rows.
    sequence_length: tokens per row of text; unused for packed rows.
    tokens: number of tokens to read, rounded up to whole batches.
    batch_size: rows per batch, rounded up to a multiple of the mesh's shards of rows.
    seed: seeds the order of packed rows.
    dtype: dtype of the computation.
  """

  data: str = "pydoc:topics"
  text_key: str = "text"
  sequence_length: Annotated[int, AtLeast(1)] = 512
  tokens: Annotated[int, AtLeast(1)] = 32768
  batch_size: Annotated[int, AtLeast(1)] = 8
  seed: Annotated[int, AtLeast(0)] = 0
  dtype: Literal["float32", "bfloat16", "float64"] = "float32"


@dataclasses.dataclass(frozen=True)
class Calibrated(Reading):
  """Feature maps phi(x) = relu(x), and projections solved for by least squares on a text, layer by layer.

  With `keep_softmax`, the layers are calibrated twice: once all of them, to measure which ones should stay softmax, and
  then again without these.

  Attributes:
    ridge, mlp: see `calibrate`.
    keep_softmax: number of layers to keep as softmax layers: those that bring the calibrated student nearest to its
      teacher (see `hybrid`). None: all chosen layers are linearised.
    measured_tokens: number of tokens, beyond `tokens`, that `keep_softmax` measures on.
  """

  method = "calibrated"
  ridge: Annotated[float, AtLeast(0)] = RIDGE
  mlp: bool = True
  keep_softmax: int | None = None
  measured_tokens: Annotated[int, AtLeast(1)] = MEASURED_TOKENS


@dataclasses.dataclass(frozen=True)
class Memory(Reading):
  """The teacher's softmax attention over as many tokens as a state of a given size holds (mixer `memory`).

  Each key/value head holds the first tokens, the last ones, and others that attention has met most; how many of those
  depends on what the loss becomes without them, which is estimated on a text and on random strings planted in it that
  are to be looked up (`allotment`). Nothing is trained.

  Attributes:
    state_bytes: size in bytes of the state of one sequence, which no length of text changes. None: see `state_tokens`.
    state_tokens: the same as the number of tokens whose keys and values take so many bytes, of each key/value head.
    state_dtype: dtype in which the state is to hold keys and values; what they take is counted in it.
    window, sinks, chunk: W, N and C of `MemoryConfig`. None: W and C that suit the size.
    patterns: most patterns of sizes that layers have, see `allotment`. Fewer compile faster and hold less of what
      matters.
    recall_weight: weight of what is lost where random strings are to be looked up, planted in a third of the rows,
      beside what is lost on text. 1: summed over all sizes, both are the same. 0: nothing is planted.
  """

  method = "memory"
  own_mixer = True
  sequence_length: Annotated[int, AtLeast(1)] = 2048
  tokens: Annotated[int, AtLeast(1)] = 6144
  batch_size: Annotated[int, AtLeast(1)] = 1
  state_bytes: Annotated[int, POSITIVE] | None = None
  state_tokens: Annotated[int, POSITIVE] = 260
  state_dtype: Literal["float32", "bfloat16"] = "bfloat16"
  window: Annotated[int, POSITIVE] | None = None
  sinks: Annotated[int, AtLeast(0)] = MemoryConfig.sinks
  chunk: Annotated[int, POSITIVE] | None = None
  patterns: Annotated[int, AtLeast(1)] = 4
  recall_weight: Annotated[float, AtLeast(0)] = 1.0

  def layer(self, mixer: MixerConfig | None) -> MixerConfig:
    """Returns a MemoryConfig; the sizes of heads are found later.

    Raises:
      ValueError: `mixer` is given.
    """
    self._makes_its_own(mixer)
    return MemoryConfig(sinks=self.sinks)


STARTS: dict[str, type[Start]] = {
  start.method: start for start in (Memory, Window, Lolcats, Calibrated, Identity, Random)
}
