"""The flags of `linearize` that say how layers begin."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from supra_jax.bin.choices import given
from supra_jax.bin.mixer_flag import HELP
from supra_jax.core.amounts import parse_bytes
from supra_jax.linearization.starts import MEASURED_TOKENS, STARTS, Calibrated, Memory, Reading, Start, Window

flags.disclaim_key_flags()  # --help of each program lists them as its own
_METHOD = (
  "How the layers begin. memory: softmax attention over as many tokens as a state of a given size holds. window: over "
  "the last ones, linear attention beside it; reads no text. lolcats: LoLCATs' layer. The others: linear attention "
  "alone, calibrated on a text, identity (relu), random. Default: memory; with --window: window; --mixer: identity."
)
_BYTES = f"memory: size of the state at any length of text, such as 6MB. Default: --state_tokens={Memory.state_tokens}."
_LAST = f"Softmax attention sees so many last tokens. Default: {Window.window}; memory: by the size of its state."
_READ = f"Tokens to read, rounded up to whole rows. Default: calibrated {Calibrated.tokens}, memory {Memory.tokens}."
_FIELDS = {"calibration_data": "data", "calibration_tokens": "tokens", "calibrate_mlp": "mlp"}
OF_MIXER = ["feature_map", "decay", "decay_start", "qk_norm"]  # of SUPRA's linear attention
_ALSO = {k: [*OF_MIXER, "mixer"] * (not of.own_mixer) + ["mesh"] * issubclass(of, Reading) for k, of in STARTS.items()}
_WHY = {"memory": "the default", "window": "which --window without a size means", "identity": "which --mixer means"}


def define() -> Callable[[], Start]:
  """Defines the flags; returns a function that makes the start of them."""
  method = flags.DEFINE_enum("method", None, list(STARTS), _METHOD)
  size = flags.DEFINE_string("state_bytes", None, _BYTES)
  mixer = flags.DEFINE_string("mixer", None, f"Mixer of the new layers in place of supra, {HELP}")
  tokens = flags.DEFINE_integer("state_tokens", None, "memory: that size, in tokens a key/value head.", lower_bound=1)
  flags.DEFINE_integer("patterns", Memory.patterns, "memory: most patterns of sizes of heads.", lower_bound=1)
  flags.DEFINE_float("recall_weight", Memory.recall_weight, "memory: weight of recall; 0: text alone.", lower_bound=0)
  flags.DEFINE_enum("state_dtype", None, ["bfloat16", "float32"], "memory: dtype of the state's keys and values.")
  window = flags.DEFINE_integer("window", None, _LAST, lower_bound=1)
  flags.DEFINE_integer("sinks", Window.sinks, "Softmax attention sees so many first tokens too.", lower_bound=0)
  flags.DEFINE_string("calibration_data", Calibrated.data, "calibrated, memory: text, or rows as packed.")
  flags.DEFINE_integer("calibration_tokens", None, _READ, lower_bound=1)
  flags.DEFINE_bool("calibrate_mlp", True, "calibrated: solve for the MLPs' last projections too.")
  flags.DEFINE_string("text_key", "text", "calibrated, memory: key of a JSON line, or column, that holds the text.")
  flags.DEFINE_integer("keep_softmax", None, "calibrated: number of layers to leave as they are, chosen by KL.")
  flags.DEFINE_integer("measured_tokens", MEASURED_TOKENS, "calibrated: tokens for keep_softmax's KL.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "random: of the new weights. calibrated, memory: of the order of packed rows.")

  def start() -> Start:
    if size.present and tokens.present:
      raise ValueError("--state_bytes and --state_tokens both say how large the state is: wanted one of them.")
    if isinstance(size.value, str):
      flags.FLAGS[size.name].value = parse_bytes(size.value, size.name, plain=True, example="6MB")
    why = ""
    if method.value is None:
      last = window.present and not (size.present or tokens.present)
      chosen = flags.FLAGS[method.name].value = "window" if last else "identity" if mixer.present else "memory"
      why = f" ({_WHY[chosen]})"
    return given(STARTS, method, _FIELDS, _ALSO, {"measured_tokens": "keep_softmax"}, why)

  return start
