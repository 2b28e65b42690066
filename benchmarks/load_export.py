"""Loads an export in transformers as its users do, and compares it with the model on one prompt.

    python -m benchmarks.load_export --export=DIR --checkpoint=DIR [--message=TEXT]

transformers runs the code that lies beside the weights (trust_remote_code), in float32, on a prompt that its own
tokenizer and template made. Prints how far apart logits and continuations are. Fails if the ids of the prompt differ,
or logits by more than a tolerance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import flags

import supra_jax
from supra_jax.bin.entry import run


def theirs(directory: str, messages: list[dict[str, str]]) -> tuple[list[int], np.ndarray, list[int]]:
  """Returns token ids of the prompt, logits [T, vocabulary], and the ids of the likeliest continuation."""
  import torch
  import transformers

  how: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **how)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how).eval()
  prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
  with torch.no_grad():
    logits = model(**prompt).logits[0].numpy()
    written = model.generate(**prompt, max_new_tokens=_NEW.value, do_sample=False)
  ids = prompt["input_ids"][0].tolist()
  return ids, logits, written[0, len(ids) :].tolist()


def main() -> None:
  messages = [{"role": "user", "content": _MESSAGE.value}]
  ids, logits, written = theirs(_EXPORT.value, messages)
  lm = supra_jax.load(_CHECKPOINT.value, "float32")
  rendered = lm.tokenizer.encode(lm.template.render(messages), bos=False)
  if ids != rendered:
    raise ValueError(f"transformers gives the prompt the ids {ids}, the model {rendered}.")
  ours = np.asarray(lm([ids])[0][0])
  away = float(np.abs(ours - logits).max() / logits.std())
  agreeing = int((ours.argmax(-1) == logits.argmax(-1)).sum())
  # Two tokens that are as likely as each other may end the likeness.
  own = lm.complete([ids], max_new_tokens=_NEW.value, temperature=0.0)[0].tokens
  same = next((i for i, pair in enumerate(zip(own, written, strict=False)) if pair[0] != pair[1]), len(written))
  print(
    f"Largest difference {away:.1e} deviations, same likeliest token at {agreeing} of {len(ids)}; "
    f"{same} of {len(written)} generated tokens are the same."
  )
  if not away <= _TOLERANCE.value:
    raise ValueError(f"Logits differ by {away:.1e} standard deviations: wanted at most {_TOLERANCE.value}.")


if __name__ == "__main__":
  _EXPORT = flags.DEFINE_string("export", None, "Directory that orbax_to_hf wrote.", required=True)
  _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The model directory that was exported.", required=True)
  _MESSAGE = flags.DEFINE_string("message", "What is an RNN?", "Message to begin a conversation with.")
  _NEW = flags.DEFINE_integer("max_new_tokens", 8, "Tokens that transformers generates.", lower_bound=1)
  _TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "Largest difference of logits, in their standard deviations.")
  run(main)
