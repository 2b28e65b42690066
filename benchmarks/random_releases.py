"""Writes releases as Hugging Face has them, with random weights: Llama-3.2-1B-Instruct and Qwen3-0.6B.

    python -m benchmarks.random_releases --output=DIR [--release=qwen3_0_6b] [--layers=2]

config.json, generation_config.json, tokenizer_config.json and the ids of special tokens are those of the releases. The
tokenizers are of the same kind, with the releases' pre-tokenizers and ids, but learn their merges from Python's
documentation; the ids that are left have a token that no text gives. The chat templates are shortened: tools are left
out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from absl import flags
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from benchmarks import random_checkpoint
from convert_weights.byte_level import byte_level_bpe
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json

LEARNED = 3000  # tokens whose merges are learned
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not message.role in ['user', 'assistant'] %}
        {{- raise_exception("This template knows no role " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last_query_index == messages|length - 1 %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and loop.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


@dataclasses.dataclass(frozen=True)
class Release:
  """What a release on the Hugging Face hub consists of, but for weights and merges.

  Attributes:
    config: contents of config.json.
    generation: contents of generation_config.json.
    kind: kind of the pre-tokenizer, a name in `byte_level.KINDS`.
    special: special tokens, whose ids follow those of the vocabulary.
    added: further added tokens, which a decoder does not drop.
    tokenizer: contents of tokenizer_config.json, without added tokens and template.
    template: the chat template, which Llama-3.2 and Qwen3 keep in tokenizer_config.json.
  """

  config: Mapping[str, Any]
  generation: Mapping[str, Any]
  kind: str
  special: tuple[str, ...]
  added: tuple[str, ...]
  tokenizer: Mapping[str, Any]
  template: str


_RESERVED = (f"<|reserved_special_token_{number}|>" for number in itertools.count())
LLAMA_3_2_1B = Release(
  config={
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": {
      "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
      "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
  },
  generation={
    "bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6,
    "top_p": 0.9, "transformers_version": "4.45.0.dev0",
  },
  kind="llama3",
  special=(
    "<|begin_of_text|>", "<|end_of_text|>", next(_RESERVED), next(_RESERVED), "<|finetune_right_pad_id|>",
    next(_RESERVED), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *itertools.islice(_RESERVED, 245),
  ),
  added=(),
  tokenizer={
    "bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": True, "eos_token": "<|eot_id|>",
    "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
  },
  template=LLAMA_TEMPLATE,
)  # fmt: skip
QWEN3_0_6B = Release(
  config={
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
  },
  generation={
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
  },
  kind="qwen2",
  special=(
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
  ),
  added=(
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
  ),
  tokenizer={
    "add_bos_token": False, "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
    "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072,
    "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
  },
  template=QWEN_TEMPLATE,
)  # fmt: skip
RELEASES = {"llama_3_2_1b": LLAMA_3_2_1B, "qwen3_0_6b": QWEN3_0_6B}
_VOCABULARY = {"llama3": 128_000, "qwen2": 151_643}  # number of tokens before the special ones


def write(directory: Path, release: Release, *, layers: int = 0, narrower: int = 1) -> Path:
  """Writes a release with random weights; returns the path of the file with the weights.

  Args:
    directory: directory to make.
    release: which.
    layers: number of layers; 0 means the release's.
    narrower: divides the width of the model and of the feed-forward layers, for tests. Heads keep their width.
  """
  config = dict(release.config)
  if layers:
    config["num_hidden_layers"] = layers
  for name in ("hidden_size", "intermediate_size"):
    config[name] //= narrower
  weights = random_checkpoint.write(directory, **config)
  tokenizer = release_tokenizer(release)
  tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
  settings = {**release.tokenizer, "added_tokens_decoder": _added_tokens(tokenizer), "chat_template": release.template}
  files = {"generation_config.json": release.generation, "tokenizer_config.json": settings}
  if release.tokenizer["tokenizer_class"] == "Qwen2Tokenizer":  # the release has its vocabulary in two forms
    model = json.loads(tokenizer.to_str())["model"]
    files["vocab.json"] = model["vocab"]
    (directory / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
  else:
    named = ("bos_token", "eos_token")
    files["special_tokens_map.json"] = {name: release.tokenizer[name] for name in named}
  for name, values in files.items():
    (directory / name).write_text(to_json(values, indent=2) + "\n")
  return weights


def release_tokenizer(release: Release) -> Tokenizer:
  """Returns a tokenizer of the release's kind, with the release's special tokens at the release's ids."""
  # Its pre-tokenizer alone: what it is given is replaced.
  kind = byte_level_bpe({}, [], release.kind)
  learned = Tokenizer(models.BPE())
  learned.pre_tokenizer = kind.pre_tokenizer
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=LEARNED, initial_alphabet=alphabet, show_progress=False)
  learned.train_from_iterator(topics.values(), trainer)
  vocab = learned.get_vocab()
  # No text gives these tokens, since letters and digits are parted. They spell what can be decoded.
  vocab |= {f"Ġunused{number}": number for number in range(len(vocab), _VOCABULARY[release.kind])}
  merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
  made = byte_level_bpe(vocab, merges, release.kind)
  made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in release.special])
  made.add_tokens([AddedToken(token, special=False, normalized=False) for token in release.added])
  byte_level = processors.ByteLevel(trim_offsets=False)
  if release.tokenizer["bos_token"] is None:
    made.post_processor = byte_level
  else:
    begin = release.tokenizer["bos_token"]
    template = {"single": [begin, "$A"], "pair": [begin, "$A", f"{begin}:1", "$B:1"]}
    begins = processors.TemplateProcessing(**template, special_tokens=[(begin, made.token_to_id(begin))])
    made.post_processor = processors.Sequence([byte_level, begins])
  return made


def _added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
  names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
  return {
    str(number): {name: getattr(token, name) for name in names}
    for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
  }


def main() -> None:
  how = {"layers": _LAYERS.value, "narrower": _NARROWER.value}
  weights = write(Path(_OUTPUT.value), RELEASES[_RELEASE.value], **how)
  print(f"{weights.stat().st_size / 1e9:.2f} GB in {weights}")


if __name__ == "__main__":
  _OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
  _RELEASE = flags.DEFINE_enum("release", "llama_3_2_1b", list(RELEASES), "Release to draw.")
  _LAYERS = flags.DEFINE_integer("layers", 0, "Layers of the model. Default: as many as the release has.")
  _NARROWER = flags.DEFINE_integer("narrower", 1, "Divides the widths of the model, for a trial.", lower_bound=1)
  run(main)
