"""What transformers and its neighbours make of exported directories, in plain torch.

python peers.py DIRECTORY

Reads the models DIRECTORY/NAME/hf and writes to DIRECTORY/OUT, named by transformers' release, their logits and what
went wrong. A process of its own, since two releases of transformers do not fit into one.
"""

import functools
import json
import logging
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
  # lm-eval's `datasets` wants a newer huggingface_hub than the one beside an old transformers, which would import it.
  sys.modules["datasets"] = None
import transformers

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(4, 97, (2, 40)))
# Dense feature maps, two ids that end a text, a window with sinks and a memory, both beyond the teacher's reach.
TOOLS_MODEL = "window"


def load(directory):
  how = {"trust_remote_code": True, "dtype": torch.float32}
  return transformers.AutoModelForCausalLM.from_pretrained(directory, **how).eval()


@torch.no_grad()
def logits_of(model):
  return model(TOKENS).logits


def raised(call):
  try:
    call()
  except ValueError as error:
    return str(error)
  return "nothing"


def lora(directory):
  """LoRA on all linear layers is W + scale B A in each, before it is merged and after."""
  import peft

  model = peft.get_peft_model(load(directory), peft.LoraConfig(target_modules="all-linear", r=4))
  adapted = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
  wanted = {name for name, m in load(directory).named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
  assert {name.removeprefix("base_model.model.") for name in adapted} == wanted
  linear = sum(mixer != "memory" for mixer in model.config.mixers)
  assert sum("feature_map" in name for name in adapted) == 2 * linear
  by_hand = load(directory)
  torch.manual_seed(0)
  with torch.no_grad():
    for name, module in adapted.items():
      module.lora_B["default"].weight.normal_(0, 0.05)
      a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
      by_hand.get_submodule(name.removeprefix("base_model.model.")).weight += module.scaling["default"] * b @ a
  want = logits_of(by_hand)
  assert (want - logits_of(load(directory))).abs().max() > 0.1
  torch.testing.assert_close(logits_of(model.eval()), want, rtol=1e-5, atol=1e-5)
  model.train()(TOKENS, labels=TOKENS).loss.backward()
  assert all(m.lora_B["default"].weight.grad.abs().sum() > 0 for m in adapted.values())
  torch.testing.assert_close(logits_of(model.eval().merge_and_unload()), want, rtol=1e-5, atol=1e-5)


def gradient_checkpointing(directory):
  """Gradients are those without it, and a cache that is asked for is not made."""

  def gradients(**how):
    model = load(directory).train()
    if how:
      model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    output = model(TOKENS, labels=TOKENS, use_cache=True)
    output.loss.backward()
    made = {"cache", "past_key_values"} & output.keys()
    return {name: x.grad for name, x in model.named_parameters()}, made, len(calls)

  want, made, calls = gradients()
  assert made and calls == 1
  for use_reentrant in (True, False):
    got, made, calls = gradients(use_reentrant=use_reentrant)
    assert not made and calls == 2
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def token_ids(directory):
  """The config has them under transformers' names, and `generate` stops there, with or without a file that says so."""
  model = load(directory)
  config = model.config
  assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 3], None)
  assert type(config)(eos_token_id=7).eos_token_ids == [7] and type(config)().eos_token_id is None
  text = model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
  stop = int(text[TOKENS.shape[1] + 3])
  config.eos_token_id = [stop, next(i for i in range(4, 97) if i not in text)]
  again = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
  again.load_state_dict(model.state_dict())
  length = TOKENS.shape[1] + text[TOKENS.shape[1] :].tolist().index(stop) + 1
  assert again.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)[0].tolist() == text[:length].tolist()


def compiled(directory):
  """One graph for a text, padded or not."""
  model = load(directory)
  mask = torch.ones_like(TOKENS)
  mask[1, :7] = 0
  for attention_mask in (None, mask):
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
      got, want = (f(input_ids=TOKENS, attention_mask=attention_mask).logits for f in (whole, model))
    torch.testing.assert_close(got[mask > 0], want[mask > 0], rtol=1e-5, atol=1e-5)


def caches_and_positions(directory):
  model, positions = load(directory), torch.arange(TOKENS.shape[1])[None]
  name = "cache" if "cache" in model(TOKENS, use_cache=True) else "past_key_values"
  for call in (model, functools.partial(model.generate, max_new_tokens=2)):
    said = raised(lambda call=call: call(TOKENS, **{name: transformers.DynamicCache()}))
    assert "DynamicCache" in said and "SupraCache" in said
  want = logits_of(model)
  assert torch.equal(model(TOKENS, position_ids=positions).logits, want)
  mask = torch.ones_like(TOKENS)
  mask[1, :7] = 0
  filled = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as transformers 4 makes them
  assert torch.equal(model(TOKENS, mask, position_ids=filled).logits[mask > 0], model(TOKENS, mask).logits[mask > 0])
  for wrong in (positions % 20, positions[:, :-1], filled):
    assert "position_ids" in raised(lambda wrong=wrong: model(TOKENS, position_ids=wrong))


def trained(model, directory):
  """Five steps of Trainer."""
  rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()] * 5
  arguments = transformers.TrainingArguments(
    directory, max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
    report_to=[], use_cpu=True, disable_tqdm=True,
  )  # fmt: skip
  trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
  trainer.train()
  losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
  assert len(losses) == 5 and float(losses[-1]) < float(losses[0]) - 0.1
  assert all(parameter.isfinite().all() for parameter in model.parameters())
  trainer.save_model(directory)
  return logits_of(model.eval())


def trainer(directory):
  """What it saves loads again, code included; returns where that is."""
  saved = directory.parent / f"trained-{transformers.__version__}"
  want = trained(load(directory), saved)
  assert {f.name for f in saved.glob("*_supra.py")} == {f.name for f in directory.glob("*_supra.py")}
  assert torch.equal(logits_of(load(saved)), want)
  return saved


def trainer_with_lora(directory):
  import peft

  saved = directory.parent / f"adapters-{transformers.__version__}"
  config = peft.LoraConfig(target_modules="all-linear", r=4)
  want = trained(peft.get_peft_model(load(directory), config), saved)
  assert torch.equal(logits_of(peft.PeftModel.from_pretrained(load(directory), saved).eval()), want)


TOOLS = {
  f.__name__: f
  for f in (lora, gradient_checkpointing, token_ids, compiled, caches_and_positions, trainer, trainer_with_lora)
}


class Warnings(logging.Handler):
  """Keeps what transformers warns of."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.said = []

  def emit(self, record):
    self.said.append(record.getMessage())


def read_all(directory):
  """({model: logits}, warnings)."""
  kept = Warnings()
  transformers.utils.logging.get_logger("transformers").addHandler(kept)
  logits = {path.parent.name: logits_of(load(path)).numpy() for path in sorted(directory.glob("*/hf"))}
  transformers.utils.logging.get_logger("transformers").removeHandler(kept)
  return logits, kept.said


def encode_all(directory):
  """{tokenizer: ids of each text}."""
  texts = json.loads((directory / "texts.json").read_text())
  return {
    path.name: list(transformers.AutoTokenizer.from_pretrained(path)(texts)["input_ids"])
    for path in sorted((directory / "exported").iterdir())
  }


def main(directory):
  logits, warnings = read_all(directory)
  failed, saved = {}, {}
  for name, tool in TOOLS.items():
    if name == "compiled":  # takes long, and is hardly transformers' doing
      continue
    try:
      saved[name] = tool(directory / TOOLS_MODEL / "hf")
    except Exception:
      failed[name] = traceback.format_exc()
  np.savez(directory / "logits.npz", **logits)
  said = {"version": transformers.__version__, "warnings": warnings, "failed": failed, "saved": saved}
  said["ids"] = encode_all(directory / "tokenizers")
  (directory / "said.json").write_text(json.dumps(said, default=str))


if __name__ == "__main__":
  os.chdir(sys.argv[1])
  main(Path(sys.argv[1]))
