"""The config of a training run: frozen dataclasses, filled from a recipe in `configs/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from supra_jax.core.schema import POSITIVE, AtLeast, AtMost, check, check_regex, from_mapping
from supra_jax.data.packed import Documents
from supra_jax.model.adapters import AdapterConfig
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import new_parameters
from supra_jax.model.transformer import Remat
from supra_jax.training.optimizer import OptimizerConfig

NOTHING = "$^"  # a regex that is found nowhere
_EARLIER_DEFAULTS = {
  "new_weights": "feature_map|linear_o_proj|[qk]_norm",
  "transfer": "feature_map|linear_o_proj|[qk]_proj|[qk]_norm",
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data of a run: text that the run packs itself, or directories that `supra_jax.bin.prepare_data` packed.

  Exactly one of `input` and `sources` is given.

  Attributes:
    input: glob of text files, as `data.text.find_files` takes it. The run packs the files into its workdir: for small
      texts.
    text_key: the key of JSON records, or the column, that holds the text.
    messages_key: the key or column that holds conversations, in place of text: they are rendered by the model's chat
      template, and what the assistant says is learned. Empty: `input` is text.
    documents: `join` runs documents together as the paper does; `separate` resets state and position between them.
    bos: whether each document starts with the begin-of-text id.
    heldout_every: N; every N-th document is held out. At least 2 with `input`, since a run needs held-out rows.
    sources: packed directories with weights, "data/web/train:0.7,data/code/train:0.3". With `sources`, the fields above
      are unused: the packed directories say how they were packed. (Only `plan` reads `documents`, for directories that
      do not exist yet.)
    heldout: packed directory to evaluate on; required with `sources`.
    heldout_rows: number of held-out rows to evaluate on; 0 means all.
    sequence_length: T, number of input tokens per row.
  """

  input: str = ""
  text_key: str = "text"
  messages_key: str = ""
  documents: Documents = "join"
  bos: bool = False
  heldout_every: Annotated[int, AtLeast(0), "with data.input 2 or more"] = 20
  sources: str = ""
  heldout: str = ""
  heldout_rows: Annotated[int, AtLeast(0)] = 0
  sequence_length: Annotated[int, AtLeast(1)] = 2048

  def __post_init__(self):
    check(self, "data")
    if bool(self.input) == bool(self.sources):
      raise ValueError(
        f"data.input={self.input!r}, data.sources={self.sources!r}: wanted text to pack, or directories that "
        "`python -m supra_jax.bin.prepare_data` packed; one of the two."
      )
    if self.input and self.heldout_every < 2:
      raise ValueError(
        f"data.heldout_every={self.heldout_every}: wanted 2 or more with data.input: every N-th document is held "
        "out to evaluate on, the others train."
      )
    if self.sources and not self.heldout:
      raise ValueError("data.heldout is empty: wanted a packed directory to evaluate on, beside data.sources.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The config of a training run.

  Attributes:
    init_checkpoint: model directory to start from.
    data: see `DataConfig`.
    batch_size: rows per step, over all devices.
    num_steps: number of steps of the whole run; the learning-rate schedule ends with the last step.
    optimizer: see `OptimizerConfig`.
    microbatches: number of equal parts that each batch is cut into. The parts run one after another, and their
      gradients are summed in float32.
    mesh: sizes of the mesh axes of `supra_jax.core.sharding`, "data:2,fsdp:4,tensor:2". Empty: all devices on fsdp.
    dtype: dtype of the computation. Parameters, gradients and reductions are float32.
    remat: what the backward pass recomputes, see `Transformer`.
    trainable: regex; a parameter trains if the regex is found in its path. Other parameters never change and have no
      moments.
    new_weights: regex of the paths of new weights. Empty: what the model's mixers call new (`Mixer.NEW`).
    new_weights_steps: number of steps, from the start of the run, in which only `new_weights` train.
    new_weights_rate: learning-rate multiplier of `new_weights`.
    distill_from: model directory of the transformer that the model was made from; this transformer runs in each step
      as the teacher. Empty: no teacher.
    distill_weight: weight a in the loss (1 - a) cross-entropy + a KL(teacher || model) of next tokens.
    distill_hidden: weight of `layer_losses.streams_error`, the distance between the outputs of all layers and those of
      the teacher's layers; added to the loss.
    transfer_steps: number of steps, from the start of the run, in which the loss is `layer_losses.attention_error`
      alone and only the parameters of `transfer` train.
    transfer: regex of the parameters that train in `transfer_steps`. Empty: new weights, and projections of q and k.
    adapters: low-rank adapters. With a rank above 0, only adapters and `new_weights` train, and the adapters are merged
      into the kernels of the exported model.
    max_skipped: the run ends after this many skipped batches in a row. A batch is skipped, and changes no parameter, if
      its loss or gradient is not finite.
    seed: seed of the order of the data and of the adapters' initial values.
    preset: name from `supra_jax.model.presets.PRESETS`. `plan` uses this preset in place of `init_checkpoint`, and of
      `distill_from`, if that directory does not exist.
    log_every: steps between two records of training.
    evaluate_every: steps between two evaluations; 0 evaluates only before the first and after the last step.
    save_every: steps between two saved states; 0 saves a state only when a signal ends the run.
    keep_checkpoints: number of newest saved states to keep.
  """

  init_checkpoint: str
  data: DataConfig
  batch_size: Annotated[int, AtLeast(1)]
  num_steps: Annotated[int, AtLeast(1)]
  optimizer: OptimizerConfig = OptimizerConfig()
  microbatches: Annotated[int, AtLeast(1)] = 1
  mesh: str = ""
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Remat = "block"
  trainable: str = ".*"
  new_weights: str = ""
  new_weights_steps: Annotated[int, AtLeast(0)] = 0
  new_weights_rate: Annotated[float, POSITIVE, "`trainable` names what trains at all"] = 1.0
  distill_from: str = ""
  distill_weight: Annotated[float, AtLeast(0), AtMost(1), "a share of the loss"] = 1.0
  distill_hidden: Annotated[float, AtLeast(0)] = 0.0
  transfer_steps: Annotated[int, AtLeast(0)] = 0
  transfer: str = ""
  adapters: AdapterConfig = AdapterConfig()
  max_skipped: Annotated[int, AtLeast(1)] = 10
  seed: int = 0
  preset: str = ""
  log_every: Annotated[int, AtLeast(1)] = 10
  evaluate_every: Annotated[int, AtLeast(0)] = 0
  save_every: Annotated[int, AtLeast(0)] = 1000
  keep_checkpoints: Annotated[int, AtLeast(1)] = 2

  def __post_init__(self):
    check(self)
    for name in ("trainable", "new_weights", "transfer"):
      check_regex(name, getattr(self, name))
    for name in ("distill_hidden", "transfer_steps"):
      if getattr(self, name) and not self.distill_from:
        raise ValueError(f"{name}={getattr(self, name)}: wanted distill_from, the transformer it came from.")
    if self.transfer_steps and self.new_weights_steps:
      raise ValueError(
        f"transfer_steps={self.transfer_steps}, new_weights_steps={self.new_weights_steps}: wanted one of the two; the "
        "transfer trains the new weights first."
      )
    if self.batch_size % self.microbatches:
      raise ValueError(f"batch_size={self.batch_size} cannot be cut into microbatches={self.microbatches} equal parts.")

  @classmethod
  def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
    """Makes a TrainConfig from plain values, such as `ConfigDict.to_dict()` returns.

    `new_weights` and `transfer` become empty if they hold the regexes that were their defaults in earlier versions, so
    that runs which began with these versions can resume.

    Raises:
      ValueError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    values = {name: "" if value == _EARLIER_DEFAULTS.get(name) else value for name, value in values.items()}
    return from_mapping(cls, values, "train config")

  def for_model(self, model: ModelConfig) -> TrainConfig:
    """Returns the config with empty `new_weights` and `transfer` filled in from the NEW of the model's mixers.

    Raises:
      ValueError: new_weights_steps or new_weights_rate is set, `new_weights` is empty, and the mixers have no new
        weights.
    """
    new = self.new_weights or new_parameters(model.mixers)
    if not new:
      for name, unused in (("new_weights_steps", 0), ("new_weights_rate", 1.0)):
        if getattr(self, name) != unused:
          kinds = ", ".join(sorted(set(model.mixers)))
          raise ValueError(
            f"{name}={getattr(self, name)}: the model's mixers, {kinds}, have no new weights. Leave it {unused}."
          )
      new = NOTHING
    return dataclasses.replace(self, new_weights=new, transfer=self.transfer or f"{new}|[qk]_proj")

  @property
  def tokens_a_step(self) -> int:
    return self.batch_size * self.data.sequence_length

  @property
  def tokens(self) -> int:
    """Number of tokens that the whole run trains on, over all devices."""
    return self.num_steps * self.tokens_a_step

  @property
  def rows_a_microbatch(self) -> int:
    return self.batch_size // self.microbatches

  @property
  def groups(self) -> tuple[tuple[str, str], ...]:
    """(name, regex) of each group of parameters that train, for `TrainStep`; valid on what `for_model` returns."""

    def both(one: str, other: str) -> str:
      return f"^(?=.*({one}))(?=.*({other}))"  # lookaheads from the start of the path: in both regexes, wherever

    trains = both(self.trainable, f"/lora_[ab]$|{self.new_weights}") if self.adapters.rank else self.trainable
    if self.transfer_steps:
      return (("transfer", both(trains, self.transfer)), ("kept", trains))
    if self.new_weights_steps:
      return (("new", both(trains, self.new_weights)), ("kept", trains))
    return (("all", trains),)

  def active_groups(self, step: int) -> tuple[str, ...]:
    """Returns the names of the groups that step number `step`, counted from 1, trains."""
    names = tuple(name for name, _ in self.groups)
    return names[:1] if step <= max(self.new_weights_steps, self.transfer_steps) else names

  def transfers(self, step: int) -> bool:
    """Whether step number `step`, counted from 1, is one of the `transfer_steps`."""
    return step <= self.transfer_steps
