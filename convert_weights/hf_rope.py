"""RoPE settings in a Hugging Face `config.json`, in the keys of transformers 4 or 5 -> RopeConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert_weights.config_reader import ConfigReader
from supra_jax.model.config import RopeConfig, yarn_attention_factor

_DEFAULT_BASE = 10_000.0
# Kind of scaling -> keys that it requires.
_NEEDED: Mapping[str, set[str]] = {
  "default": set(),
  "linear": {"factor"},
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
  "yarn": {"factor"},
}
# Kind of scaling -> keys that it may have besides.
_OPTIONAL: Mapping[str, set[str]] = {
  "yarn": {
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
  },
}  # fmt: skip
# Keys that transformers ignores: vLLM reads attn_factor; `finetuned` only records how the checkpoint was made.
_HARMLESS = {"attn_factor", "finetuned"}
_REFUSED = {
  "dynamic": "its frequencies depend on the length of the whole text, so that cutting it would change results",
  "longrope": "its frequencies change once a text is long, so that cutting it would change results",
}


def rope_config(reader: ConfigReader) -> RopeConfig:
  """Reads RoPE settings from rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5).

  A config with keys of both must give the same settings twice. Complaints are appended to `reader.refused`; the result
  is then RoPE with default settings.
  """
  values = reader.values
  bases: set[float] = set()
  scalings: list[RopeConfig] = []
  if values.get("rope_theta") is not None:
    bases.add(reader.number("rope_theta", float, 0.0) or 0.0)
  for key in ("rope_scaling", "rope_parameters"):
    section = values.get(key)
    if section is None:
      continue
    if not isinstance(section, dict):
      reader.refuse(key, "wanted an object")
      continue
    inner = ConfigReader(section)
    if section.get("rope_theta") is not None:
      bases.add(inner.number("rope_theta", float, 0.0) or 0.0)
    scalings += _scaling(inner, values.get("max_position_embeddings"))
    reader.refused += [f"{key}.{line}" for line in inner.refused]
  if len(bases) > 1:
    reader.refused.append(f"rope_theta: given more than once, as {' and '.join(map(str, sorted(bases)))}")
  if len(set(scalings)) > 1:
    reader.refused.append(
      f"rope_scaling={values.get('rope_scaling')!r} and rope_parameters={values.get('rope_parameters')!r} disagree"
    )
  if reader.refused:
    return RopeConfig()
  scaling = scalings[0] if scalings else RopeConfig()
  try:
    return dataclasses.replace(scaling, base=bases.pop() if bases else _DEFAULT_BASE)
  except ValueError as error:
    reader.refused.append(str(error))
    return RopeConfig()


def _scaling(inner: ConfigReader, max_positions: Any) -> list[RopeConfig]:
  """Reads the scaling in rope_scaling or rope_parameters, as a list of one RopeConfig with the default base.

  The list is empty if the scaling is refused; `inner.refused` then says why.

  Args:
    inner: reader of rope_scaling or rope_parameters.
    max_positions: max_position_embeddings of the whole config, the default of YaRN's original context length.
  """
  section = inner.values
  inner.only("partial_rotary_factor", 1)
  named = [section[key] for key in ("rope_type", "type") if section.get(key) is not None] or ["default"]
  kind, name = named[0], "rope_type" if "rope_type" in section else "type"
  if named != [kind] * len(named) or not isinstance(kind, str) or kind not in _NEEDED:
    reason = _REFUSED.get(kind) if isinstance(kind, str) else None
    inner.refuse(name, reason or f"only {' or '.join(_NEEDED)} is supported")
    return []
  needed, optional = _NEEDED[kind], _OPTIONAL.get(kind, set())
  inner.unknown_keys({"rope_type", "type", "rope_theta", "partial_rotary_factor"} | needed | optional | _HARMLESS)
  for key in sorted(needed):
    if section.get(key) is None:
      inner.refuse(key, f"missing, {kind} scaling needs it")
  wanted = sorted((needed | optional) - {"truncate"})
  numbers = {key: inner.number(key, int if key.startswith("original") else float, None) for key in wanted}
  truncate = inner.flag("truncate") or section.get("truncate") is None
  if kind == "yarn" and numbers["original_max_position_embeddings"] is None:
    numbers["original_max_position_embeddings"] = ConfigReader({"value": max_positions}).number("value", int, None)
    if numbers["original_max_position_embeddings"] is None:
      inner.refuse("original_max_position_embeddings", "missing, and so is max_position_embeddings, its default")
  if inner.refused:
    return []
  try:
    if kind == "default":
      return [RopeConfig()]
    if kind == "linear":
      return [RopeConfig(scaling="linear", factor=numbers["factor"])]
    original = numbers["original_max_position_embeddings"]
    if kind == "yarn":
      return [
        RopeConfig(
          scaling="yarn",
          factor=numbers["factor"],
          original_max_positions=original,
          beta_fast=numbers["beta_fast"] or RopeConfig.beta_fast,
          beta_slow=numbers["beta_slow"] or RopeConfig.beta_slow,
          truncate=truncate,
          attention_factor=_attention_factor(numbers),
        )
      ]
    return [
      RopeConfig(
        scaling="llama3",
        factor=numbers["factor"],
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_max_positions=original,
      )
    ]
  except ValueError as error:
    inner.refused.append(str(error))
    return []


def _attention_factor(yarn: Mapping[str, float | None]) -> float:
  """Returns the factor by which YaRN multiplies q and k.

  With f(m) = 0.1 m ln(factor) + 1, or 1 if factor <= 1, this is attention_factor if the config has that key; else
  f(mscale) / f(mscale_all_dim) if the config has both of these keys, which are DeepSeek's; else f(1), as in the paper
  on YaRN (arXiv 2309.00071).
  """
  if yarn["attention_factor"] is not None:
    return yarn["attention_factor"]

  factor = yarn["factor"] or 1.0
  if yarn["mscale"] and yarn["mscale_all_dim"]:
    return yarn_attention_factor(factor, yarn["mscale"]) / yarn_attention_factor(factor, yarn["mscale_all_dim"])
  return yarn_attention_factor(factor)
