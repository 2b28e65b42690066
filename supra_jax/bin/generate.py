"""Generates text with a model and streams it: `python -m supra_jax.bin.generate --checkpoint=DIR --prompt=TEXT`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from absl import flags

import supra_jax
from supra_jax.bin.entry import DTYPES, run
from supra_jax.bin.implementation import with_implementation

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to generate with.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; with --chat or --interactive, the first message.")
_CHAT = flags.DEFINE_bool("chat", False, "Answer --prompt as a message, by the checkpoint's chat template.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Converse: messages are read from the terminal, line by line.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "Tokens to generate at most.", lower_bound=0)
_OWN = "Default: as generation_config.json in the model directory says;"
flags.DEFINE_float(
  "temperature", None, f"Divides the logits; 0 takes the likeliest token. {_OWN} else 0.", lower_bound=0
)
flags.DEFINE_integer("top_k", None, f"Draw from the k likeliest tokens; 0: all. {_OWN} else 0.", lower_bound=0)
flags.DEFINE_float("top_p", None, f"Draw from the fewest tokens whose probabilities add up to this. {_OWN} else 1.")
flags.DEFINE_float("min_p", None, f"Draw from tokens at least so many times as likely as the likeliest. {_OWN} else 0.")
flags.DEFINE_float("repetition_penalty", None, f"Divides logits of tokens in prompt and text. {_OWN} else 1.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text before which the answer ends; may be given several times.")
flags.DEFINE_integer("seed", 0, "Seeds the draws of tokens.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of parameters and computation. Default: as stored.")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _shown(texts: Iterable[str]) -> str:
  """Prints texts as they come, and returns them as one."""
  found = []
  for text in texts:
    print(text, end="", flush=True)
    found.append(text)
  print()
  return "".join(found)


def main() -> None:
  warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
  if _PROMPT.value is None and not _INTERACTIVE.value:
    raise ValueError("--prompt is not given: wanted a text to continue, or --interactive.")
  how = {name: flags.FLAGS[name].value for name in _DRAWS}
  how |= {"max_new_tokens": _MAX_NEW_TOKENS.value, "stop": _STOP.value}
  lm = supra_jax.load(_CHECKPOINT.value, _DTYPE.value)
  if not (_CHAT.value or _INTERACTIVE.value):
    texts = lm.stream(_PROMPT.value, **how)
    print(_PROMPT.value, end="", flush=True)
    _shown(texts)
    return
  messages: list[dict[str, str]] = []
  asked = [_PROMPT.value] if _PROMPT.value else []
  for text in (*asked, *(map(str.rstrip, sys.stdin) if _INTERACTIVE.value else ())):
    messages.append({"role": "user", "content": text})
    messages.append({"role": "assistant", "content": _shown(lm.stream_chat(messages, **how))})


if __name__ == "__main__":
  run(with_implementation(main))
