"""Generates text with a model and streams it: `python -m supra_jax.bin.generate --checkpoint=DIR --prompt=TEXT`."""

from __future__ import annotations

import sys
import warnings

from absl import flags

import supra_jax
from supra_jax.bin.entry import DTYPES, run
from supra_jax.bin.implementation import with_implementation

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to generate with.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "Tokens to generate at most.", lower_bound=0)
_OWN = "Default: as generation_config.json in the model directory says;"
_TEMPERATURE = flags.DEFINE_float(
  "temperature", None, f"Divides the logits; 0 takes the likeliest token each time. {_OWN} else 0.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, f"Draw from the k likeliest tokens; 0 means all. {_OWN} else 0.", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
  "top_p", None, f"Draw from the fewest likeliest tokens whose probabilities add up to this. {_OWN} else 1."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seeds the draws of tokens.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of parameters and computation. Default: as stored.")


def main() -> None:
  warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
  lm = supra_jax.load(_CHECKPOINT.value, _DTYPE.value)
  texts = lm.stream(
    _PROMPT.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  print(_PROMPT.value, end="", flush=True)
  for text in texts:
    print(text, end="", flush=True)
  print()


if __name__ == "__main__":
  run(with_implementation(main))
