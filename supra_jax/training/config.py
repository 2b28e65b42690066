"""What a run is: frozen dataclasses, read from a recipe in `configs/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from supra_jax.core.schema import POSITIVE, AtLeast, AtMost, check, from_mapping
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
  """What a run reads: text that it packs itself, or directories that `supra_jax.bin.prepare_data` packed.

  Attributes:
    input: text files, as `text.find_files` takes them; the run packs them into its workdir. For small texts.
    text_key: key of JSON lines, or column of parquet files, that holds the text.
    documents: `join` runs documents together as the paper does; `separate` resets state and position between them.
    bos: start each document with the begin-of-text id.
    heldout_every: every N-th document is held out.
    sources: packed directories with weights, "data/web/train:0.7,data/code/train:0.3". With sources, the options above
      are unused: the directories say how they were packed.
    heldout: packed directory to evaluate on; needed with sources.
    heldout_rows: number of held-out rows to evaluate on; 0 means all.
    sequence_length: T, tokens of a row.
  """

  input: str = ""
  text_key: str = "text"
  documents: Documents = "join"
  bos: bool = False
  heldout_every: Annotated[int, AtLeast(0)] = 20
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
    if self.sources and not self.heldout:
      raise ValueError("data.heldout is empty: wanted a packed directory to evaluate on, beside data.sources.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A run.

  Attributes:
    init_checkpoint: model directory to start from.
    data, optimizer: see their classes.
    batch_size: rows of a step, over all devices.
    num_steps: steps of the whole run; the learning-rate schedule ends with them.
    microbatches: number of parts of a batch, which run one after another. Their gradients are summed in float32.
    mesh: sizes of the mesh axes of `supra_jax.core.sharding`, "data:2,fsdp:4,tensor:2". Empty: all devices on fsdp.
    dtype: dtype of the computation. Parameters, moments and reductions are float32.
    remat: what the backward pass recomputes, see `Transformer`.
    trainable: regex; parameters whose path it is found in train. The others never change and have no moments.
    new_weights: regex of the paths of new weights. Empty: what the model's mixers call new (`Mixer.NEW`).
    new_weights_steps: for so many first steps only `new_weights` train.
    new_weights_rate: learning-rate multiplier of `new_weights`.
    distill_from: model directory of the transformer that the model was made from, which then runs in each step as a
      teacher. Empty: no teacher.
    distill_weight: weight, in the loss, of the divergence from the teacher's next-token distribution; cross-entropy
      has the rest of 1.
    distill_hidden: weight of `layer_losses.streams_error`, the distance of all layers' outputs from the teacher's,
      which is added to the loss.
    transfer_steps: for so many first steps the loss is `layer_losses.attention_error` alone, and only `transfer` train.
    transfer: regex of the parameters that train in `transfer_steps`. Empty: new weights, and projections of q and k.
    adapters: low-rank adapters. If they have a rank, only they and `new_weights` train; the exported model has them
      merged into its kernels.
    max_skipped: number of batches in a row with a loss or gradient that is not finite, each of which is skipped, that
      ends the run.
    seed: seed of the order of the data, and of adapters.
    preset: one of `supra_jax.model.presets.PRESETS`, which `plan` takes for init_checkpoint while that is missing.
    log_every: steps between two records of training.
    evaluate_every: steps between two evaluations; 0 evaluates only before and after.
    save_every: steps between two saved states; 0 saves none.
    keep_checkpoints: number of saved states to keep, the newest.
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
    """Reads a ConfigDict's `to_dict()`, and configs of runs that began when these regexes were defaults."""
    values = {name: "" if value == _EARLIER_DEFAULTS.get(name) else value for name, value in values.items()}
    return from_mapping(cls, values, "train config")

  def for_model(self, model: ModelConfig) -> TrainConfig:
    """The config with the regexes that a model's mixers fill in.

    Raises:
      ValueError: the run treats new weights apart, and the mixers of the model have none.
    """
    new = self.new_weights or new_parameters(model.mixers)
    if not new:
      for name, unused in (("new_weights_steps", 0), ("new_weights_rate", 1.0)):
        if getattr(self, name) != unused:
          kinds = ", ".join(sorted(set(model.mixers)))
          raise ValueError(f"{name}={getattr(self, name)}: the model's mixers, {kinds}, have no new weights.")
      new = NOTHING
    return dataclasses.replace(self, new_weights=new, transfer=self.transfer or f"{new}|[qk]_proj")

  @property
  def tokens_a_step(self) -> int:
    return self.batch_size * self.data.sequence_length

  @property
  def tokens(self) -> int:
    """Tokens of the whole run."""
    return self.num_steps * self.tokens_a_step

  @property
  def rows_a_microbatch(self) -> int:
    return self.batch_size // self.microbatches

  @property
  def groups(self) -> tuple[tuple[str, str], ...]:
    """(name, regex) of the groups of parameters that train, for `TrainStep`; of a config `for_model`."""

    def both(one: str, other: str) -> str:
      return f"^(?=.*({one}))(?=.*({other}))"  # lookaheads from the start of the path: in both regexes, wherever

    trains = both(self.trainable, f"/lora_[ab]$|{self.new_weights}") if self.adapters.rank else self.trainable
    if self.transfer_steps:
      return (("transfer", both(trains, self.transfer)), ("kept", trains))
    if self.new_weights_steps:
      return (("new", both(trains, self.new_weights)), ("kept", trains))
    return (("all", trains),)

  def active_groups(self, step: int) -> tuple[str, ...]:
    """Which groups step number `step`, from 1, trains."""
    names = tuple(name for name, _ in self.groups)
    return names[:1] if step <= max(self.new_weights_steps, self.transfer_steps) else names

  def transfers(self, step: int) -> bool:
    """Whether step number `step`, from 1, is of the attention transfer."""
    return step <= self.transfer_steps
