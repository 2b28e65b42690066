"""Generates text with a model and streams it: `python -m supra_jax.bin.generate --checkpoint=DIR --prompt=TEXT`."""

from __future__ import annotations

import itertools

from absl import flags

from supra_jax.bin import model_flags
from supra_jax.bin.conversation import converse, lines, shown
from supra_jax.bin.entry import run
from supra_jax.bin.implementation import with_implementation

_load = model_flags.define()
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; with --chat or --interactive, the first message.")
_CHAT = flags.DEFINE_bool("chat", False, "Answer --prompt as a message, by the checkpoint's chat template.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Converse: messages are read from the terminal, line by line.")
flags.DEFINE_integer("max_new_tokens", 100, "Tokens to generate at most.", lower_bound=0)
_OWN = "Default: as generation_config.json in the model directory says;"
_NUMBERS = {
  "temperature": f"Divides the logits; 0 takes the likeliest token. {_OWN} else 0.",
  "top_p": f"Draw from the fewest tokens whose probabilities add up to this. {_OWN} else 1.",
  "min_p": f"Draw from tokens at least so many times as likely as the likeliest. {_OWN} else 0.",
  "repetition_penalty": f"Divides logits of tokens in prompt and text. {_OWN} else 1.",
}
_ = [flags.DEFINE_float(name, None, said) for name, said in _NUMBERS.items()]
flags.DEFINE_integer("top_k", None, f"Draw from the k likeliest tokens; 0: all. {_OWN} else 0.", lower_bound=0)
flags.DEFINE_multi_string("stop", [], "Text before which the answer ends; may be given several times.")
flags.DEFINE_integer("seed", 0, "Seeds the draws of tokens.")


def main() -> None:
  first = [] if _PROMPT.value is None else [_PROMPT.value]
  if not first and not _INTERACTIVE.value:
    raise ValueError("--prompt is not given: wanted a text to continue, or --interactive.")
  how = {name: flags.FLAGS[name].value for name in (*_NUMBERS, "top_k", "seed", "max_new_tokens", "stop")}
  lm = _load()
  if not (_CHAT.value or _INTERACTIVE.value):
    shown(itertools.chain(first, lm.stream(first[0], **how)))
  else:
    converse(lm, itertools.chain(first, lines() if _INTERACTIVE.value else ()), **how)


if __name__ == "__main__":
  run(with_implementation(main))
