"""Model card of an export (README.md): where the model comes from, what it is, and how to load it.

The card starts with the YAML metadata that model hubs read. It states only what source.json of the model directory
records about how the model was made, step by step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData, metadata_load

from convert_weights import openlm_config
from convert_weights.export import Export
from convert_weights.source import Source
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.lolcats import LolcatsConfig
from supra_jax.model.mixers.mamba import MambaConfig
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.supra import LinearConfig, SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.mixers.t2r import NormalisedConfig
from supra_jax.model.registry import MixerConfig
from supra_jax.storage.model_directory import ModelCheckpoint

FILE = "README.md"
_TRIED = "4.57, 5.3 and 5.24"
_ON_THE_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")
_LICENSE = ("license", "license_name", "license_link")
_PAPER = "[SUPRA](https://arxiv.org/abs/2405.06640)"


def stated_license(source: Source) -> dict[str, Any]:
  """Returns the licence that a source states, under the keys of a model card; empty if the source states none.

  The licence is read from the metadata of a GGUF file or, if that states none, from the YAML header of the README.md
  beside the weights.
  """
  said = {key: source.original_config.get("general." + key.replace("_", ".")) for key in _LICENSE}  # GGUF keys
  readme = (source.path if source.path.is_dir() else source.path.parent) / FILE
  if said["license"] is None and readme.is_file():
    try:
      metadata = metadata_load(readme) or {}
    except Exception:  # the YAML reader's own error types: an unreadable card states no licence
      metadata = {}
    said = {key: metadata.get(key) for key in _LICENSE}
  return {key: value for key, value in said.items() if value is not None}


def card(model: ModelCheckpoint, export: Export, dtype: np.dtype, *, has_tokenizer: bool) -> bytes:
  """Returns the contents of an export's README.md.

  Args:
    model: model to export; its parameters are not used.
    export: description of the directory that is written.
    dtype: type of the written weights.
    has_tokenizer: whether a tokenizer is written too.
  """
  origin, steps = _history(model.source)
  hub = _ON_THE_HUB.fullmatch(str(origin.get("name")))
  linear = any(isinstance(layer, LinearConfig | LolcatsConfig) for layer in model.config.layers)
  bounded = "memory" in model.config.mixers
  openlm = export.config["model_type"] == openlm_config.MODEL_TYPE
  data = ModelCardData(
    base_model=hub["id"] if hub else None,
    library_name=None if openlm else "transformers",
    pipeline_tag="text-generation",
    tags=["supra"] * (linear or bounded) + ["linear-attention"] * linear or None,
    **_license(origin.get("license"), hub["id"] if hub else None),
  )
  name = hub["id"].partition("/")[2] if hub else origin.get("name", "A language model")
  count = sum(math.prod(tensor.shape) for tensor in export.tensors)
  sections = [
    f"---\n{data.to_yaml()}\n---",
    f"# {name}" + (", linearised" if linear else ", with a bounded memory" if bounded else ""),
    "\n".join(
      [
        *_base(origin, hub),
        *(_step(step) for step in steps),
        *_layers(model.config),
        f"- {count:,} parameters, {dtype.name}.",
      ]
    ),
    "## Load\n\n" + (_load_openlm() if openlm else _load(has_tokenizer, own_code="auto_map" in export.config)),
    "## Go on in JAX\n\nWith supra_jax; the parameters come back bit for bit:\n\n"
    "```\npython -m convert_weights.hf_to_orbax --source=USER/NAME@COMMIT --output=DIR\n```",
    "## Upload\n\nFrom this directory:\n\n```\nhf upload USER/NAME .\n```",
  ]
  return ("\n\n".join(sections) + "\n").encode()


def _history(source: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
  """Splits source.json into the entry of the converted model and the entries of the later steps, oldest first."""
  steps: list[Mapping[str, Any]] = []
  while (before := source.get("trained_from", source.get("linearized_from"))) is not None:
    steps.insert(0, source)
    source = before
  return source, steps


def _license(stated: Any, hub_id: str | None) -> dict[str, Any]:
  license = dict(stated or {})
  link = license.get("license_link")
  if isinstance(link, str) and "://" not in link:  # names a file in the source's repository
    license["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}" if hub_id else None
  return license


def _base(origin: Mapping[str, Any], hub: re.Match[str] | None) -> list[str]:
  if hub:
    name = f"[{hub['id']}](https://huggingface.co/{hub['id']}) at commit `{hub['commit']}`"
  elif origin.get("name"):
    name = f"`{origin['name']}`"
  else:
    return []
  files: Sequence[Mapping[str, Any]] = origin.get("files", ())
  types: Sequence[str] = origin.get("stored_types", ())
  digest = f", sha256 `{files[0]['sha256']}`" if len(files) == 1 else ""
  return [f"- Base model: {name}{digest}" + (f"; stored as {', '.join(types)}." if types else ".")]


def _step(step: Mapping[str, Any]) -> str:
  """Returns one line of the card about one step of `source.json`: a linearisation or a training run."""
  if "linearized_from" in step and step.get("mixer", {}).get("mixer") == "memory":
    tokens = step.get("calibrated_on")
    sizes = "" if tokens is None else f", whose size in each head was found on {tokens:,} tokens"
    return f"- Given a bounded memory{sizes}."
  if "linearized_from" in step:
    return f"- Linearised ({_PAPER}): {_method(step)}."
  config = step.get("train_config") or {}
  words = ["- Trained"]
  if step.get("tokens_trained") is not None:
    words.append(f"on {step['tokens_trained']:,} tokens")
  if config.get("num_steps") is not None:
    words.append(f"in {config['num_steps']:,} steps")
  if config.get("distill_from"):
    words.append("by distillation")
  losses = step.get("heldout_nll") or {}
  known = [f"{losses[when]:.4f} {when}" for when in ("before", "after") if losses.get(when) is not None]
  return " ".join(words) + (f"; held-out loss in nats a token: {', '.join(known)}." if known else ".")


def _method(step: Mapping[str, Any]) -> str:
  start, kept = _start(step), step.get("kept_softmax")
  stay = f", and layers {', '.join(map(str, kept['layers']))} stayed as they were" if kept else ""
  if start["method"] == "calibrated":
    return f"calibrated by least squares, calibration_tokens={start['tokens']}{stay}"
  if start["method"] == "window":
    first = f" and a text's first {start['sinks']}" if start.get("sinks") else ""
    return (
      f"window, the base model's own softmax attention over the last {start['window']} tokens{first}, beside linear "
      f"attention whose projection began as 0{stay}"
    )
  return "identity, phi(x) = relu(x)" if start["method"] == "identity" else "random phi, the paper's start"


def _start(step: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns how the linear layers were initialised, in the form of `linearization.starts`; reads older keys too."""
  if "start" in step:
    return step["start"]
  if step.get("calibration"):
    return {"method": "calibrated", **step["calibration"]}
  if step.get("window") is not None:
    return {"method": "window", "window": step["window"], "sinks": step.get("sinks")}
  return {"method": "identity" if step.get("phi") == "identity" else "random"}


def _layers(config: ModelConfig) -> list[str]:
  """Returns lines of the card: one for each kind of layer, and one if memory does not grow with the text."""
  lines = []
  for layer in dict.fromkeys(config.layers):
    where = [i for i, other in enumerate(config.layers) if other == layer]
    which = f"All {len(where)} layers" if len(where) == config.num_layers else f"Layers {', '.join(map(str, where))}"
    lines.append(f"- {which}: {_kind(config, layer)}.")
  if "softmax" not in config.mixers or config.sliding_window is not None:
    lines.append("- Its memory does not grow with the text.")
  return lines


def _kind(config: ModelConfig, layer: MixerConfig) -> str:
  if isinstance(layer, MemoryConfig):
    sinks = f", a text's first {layer.sinks}" if layer.sinks else ""
    last, others = (
      _range(layer.window + 1, layer.window + layer.chunk),
      _range(min(layer.retained), max(layer.retained)),
    )
    chosen = "have received most attention" if layer.score == "attention" else "are drawn at random"
    return f"softmax attention over the last {last} tokens{sinks}, and in each head {others} others, which {chosen}"
  if isinstance(layer, LolcatsConfig):
    return (
      f"LoLCATs' attention: softmax over the last {layer.window} tokens, and linear attention over all earlier ones"
    )
  if isinstance(layer, MambaConfig):
    return f"Mamba's block, with {layer.state_size} numbers in the state of a channel and no MLP"
  if isinstance(layer, NormalisedConfig):
    phi = f"phi {layer.feature_map}" if isinstance(layer, SupraConfig) else "phi(x) = elu(x) + 1"
    return f"linear attention divided by the sum of its weights ({phi}, decay {layer.decay})"
  if not isinstance(layer, SupraConfig):
    seen = "all tokens" if config.sliding_window is None else f"the last {config.sliding_window} tokens"
    return f"softmax attention over {seen}"
  linear = f"linear attention (phi {layer.feature_map}, decay {layer.decay})"
  if not isinstance(layer, WindowConfig):
    return linear
  sinks = f" and a text's first {layer.sinks}" if layer.sinks else ""
  return f"softmax attention over the last {layer.window} tokens{sinks}, and {linear}"


def _range(least: int, most: int) -> str:
  return str(least) if least == most else f"{least} to {most}"


def _load(has_tokenizer: bool, own_code: bool) -> str:
  trust = ", trust_remote_code=True" if own_code else ""
  lines = [
    "```python",
    "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""),
    "",
    'model_id, revision = "USER/NAME", "COMMIT"',
    f'model = AutoModelForCausalLM.from_pretrained(model_id, revision=revision, dtype="auto"{trust})',
  ]
  if has_tokenizer:
    lines += [
      f"tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision{trust})",
      'inputs = tokenizer("Once upon a time", return_tensors="pt")',
      "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]
  lines += ["```", "", ""]
  if own_code:
    return "\n".join(lines) + (
      "`trust_remote_code=True` runs the Python files beside the weights: read them, and pin `revision` to the commit "
      f"that you read. They need torch and transformers alone, and were tried with transformers {_TRIED}. Programs "
      "with code of their own for each architecture, such as vLLM and llama.cpp, cannot run this model."
    )
  return "\n".join(lines) + (
    f"Pin `revision` to a commit, so that the model stays the same. It was tried with transformers {_TRIED}, and needs "
    "no code but theirs: what runs models of this architecture runs it."
  )


def _load_openlm() -> str:
  return (
    "It is in the format of OpenLM: [the paper's own code](https://github.com/TRI-ML/linear_open_lm) loads it with "
    "`from_pretrained`. transformers by itself, vLLM and llama.cpp cannot."
  )
