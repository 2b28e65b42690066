"""Streams text from a model: `python -m supra_jax.bin.generate --checkpoint=DIR --prompt=TEXT`."""

from __future__ import annotations

import sys
import warnings

from absl import flags

import supra_jax
from supra_jax.bin.entry import DTYPES, run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.", required=True)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "At most so many.", lower_bound=0)
_OWN = "Default: the checkpoint's generation_config.json."
_TEMPERATURE = flags.DEFINE_float(
  "temperature", None, f"0 takes the likeliest token each time. {_OWN} Else 0.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer("top_k", None, f"Draw from the k likeliest tokens; 0 means all. {_OWN}", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", None, f"Draw from the likeliest tokens that reach this probability. {_OWN}")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of the computation. Default: as stored.")


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
  run(main)
