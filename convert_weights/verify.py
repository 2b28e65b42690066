r"""Compares a converted model with its source: runs both on the same text, in float32, and compares their logits.

python -m convert_weights.verify --source=SOURCE --checkpoint=DIR [--tolerance=1e-3] [--text=FILE]

transformers runs the source (pip install 'supra_jax[torch]'). The exit status is 1 if the logits differ by more than
the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
from absl import flags

from convert_weights import hf_config, hf_export, mamba
from convert_weights.errors import ConversionError
from convert_weights.open_source import open_source
from convert_weights.program import flags_of
from convert_weights.source import Source
from supra_jax.bin.entry import run
from supra_jax.core.files import local
from supra_jax.inference import lm
from supra_jax.model.finite import not_finite
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.storage.model_directory import load_model_without_params

# Tokens of the text that are used: enough to reveal a wrong rotary angle or window, and few enough for a CPU.
MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How far the logits of a converted model are from those of its source.

  Attributes:
    num_tokens: number of positions at which the logits were compared.
    largest, mean: largest and mean absolute difference between corresponding logits.
    deviation: standard deviation of the source's logits.
    agreeing: number of positions at which both models give the same most likely next token.
    chooses: whether layers choose which tokens they hold on, where rounding may decide.
  """

  num_tokens: int
  largest: float
  mean: float
  deviation: float
  agreeing: int
  chooses: bool = False


def compare(source: str | os.PathLike[str], checkpoint: str | os.PathLike[str], text: str | None = None) -> Comparison:
  """Runs a source and its converted model on the same tokens, at most MAX_TOKENS, and compares the logits.

  Args:
    source: the source that `hf_to_orbax.convert` was given.
    checkpoint: model directory that `hf_to_orbax.convert` wrote.
    text: text to encode with the checkpoint's tokenizer; None takes Python's own documentation. A checkpoint without a
      tokenizer gets random tokens instead.

  Raises:
    ConversionError: torch or transformers is not installed, or transformers cannot run the source; the two models have
      different vocabulary sizes; some logits are not finite; the text is empty; or `open_source` refuses the source.
    ValueError, OSError: the checkpoint is damaged or is no model directory.
  """
  ignored = load_model_without_params(checkpoint).source.get("ignored_config_keys", ())
  opened = open_source(source, own_tokenizer=False, ignore_config_keys=ignored)
  if opened.kind not in _RUNNERS:
    raise ConversionError(f"{source}: transformers has no model for a source of the kind {opened.kind!r}.")
  tokens, ours = _run_checkpoint(checkpoint, text)
  if ours.shape[-1] != opened.config.vocab_size:
    raise ConversionError(
      f"{checkpoint} was not converted from {source}: it has {ours.shape[-1]} logits, not {opened.config.vocab_size}."
    )
  theirs = _RUNNERS[opened.kind](opened, tokens)
  if not np.isfinite(theirs).all():
    raise ConversionError(
      f"{source}: its logits are not finite where transformers runs it in float32: there is nothing to compare."
    )
  difference = np.abs(ours - theirs)
  return Comparison(
    len(tokens),
    float(difference.max()),
    float(difference.mean(dtype=np.float64)),
    float(theirs.std(dtype=np.float64)),
    int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    "memory" in opened.config.mixers,
  )


def _run_checkpoint(checkpoint: str | os.PathLike[str], text: str | None) -> tuple[np.ndarray, np.ndarray]:
  """Returns token ids int64 [T] and logits float32 [T, vocabulary]; the parameters are freed on return."""
  stored = lm.load(checkpoint, "float32")
  layers = (
    # One key that is rounded to the other neighbour would hide what the weights do.
    dataclasses.replace(layer, state_dtype="float32") if isinstance(layer, MemoryConfig) else layer
    for layer in stored.config.layers
  )
  model = lm.LM(stored.config.replace(layers=tuple(layers)), stored.params, stored.tokenizer)
  if model.tokenizer is None:
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=MAX_TOKENS)
  else:
    given = "\n".join(topics[name] for name in sorted(topics)[:20]) if text is None else text
    tokens = np.array(model.tokenizer.encode(given)[:MAX_TOKENS], np.int64)
  if not len(tokens):
    raise ConversionError("The text is empty.")
  # By default, accelerators multiply float32 at lower precision.
  with jax.default_matmul_precision("highest"):
    logits = np.asarray(model(tokens[None])[0][0])
    if not np.isfinite(logits).all():
      raise ConversionError(f"{checkpoint}: {not_finite(model.model, model.params, [tokens.tolist()])}")
  return tokens, logits


def _run_transformers(source: Source, tokens: np.ndarray) -> np.ndarray:
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ConversionError(f"Running the source needs {error.name}: pip install 'supra_jax[torch]'.") from error
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  load = _load_gguf if source.kind == "gguf" else _load_huggingface
  try:
    with torch.no_grad():
      return load(source).eval()(torch.from_numpy(tokens[None])).logits[0].numpy()
  except Exception as error:  # transformers raises errors of many types for a model it cannot run
    said = " ".join(str(error).split()) or type(error).__name__
    raise ConversionError(f"{source.path}: transformers does not run it: {said}") from error


def _load_huggingface(source: Source) -> Any:
  """Returns transformers' model with the weights in `source.weight_files`, read by torch and safetensors.

  `from_pretrained(directory)` would choose files by their names, and might choose others than the conversion did.
  """
  import safetensors.torch
  import torch
  import transformers

  state: dict[str, Any] = {}
  for path in source.weight_files:
    if path.suffix == ".safetensors":
      state |= safetensors.torch.load_file(path)
    else:
      loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
      state |= loaded.get("state_dict", loaded)
  directory = source.path if source.path.is_dir() else source.path.parent
  model_type = source.original_config["model_type"]
  if model_type == hf_export.OWN_MODEL_TYPE:
    # Runs this package's code, not the code in the directory, which may come from anyone.
    from convert_weights.for_transformers import modeling_supra

    model_class: Any = modeling_supra.SupraForCausalLM
  else:
    name = mamba.ARCHITECTURE if model_type == mamba.MODEL_TYPE else hf_config.FAMILIES[model_type].architectures[0]
    model_class = getattr(transformers, name)
  config = model_class.config_class.from_pretrained(directory, local_files_only=True)
  for memory in filter(None, getattr(config, "memories", None) or ()):
    memory["state_dtype"] = "float32"  # as in `_run_checkpoint`
  return model_class.from_pretrained(
    None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="eager"
  )


def _load_gguf(source: Source) -> Any:
  import gguf
  import torch
  import transformers

  path, *more = source.weight_files
  if more:
    raise ValueError("it cannot read a GGUF model that is split into parts.")
  how = {"gguf_file": path.name, "local_files_only": True}
  config = transformers.AutoConfig.from_pretrained(str(path.parent), **how)
  # transformers ignores these metadata of a GGUF file.
  config.head_dim = source.config.head_dim
  if source.config.rope.scaling in ("linear", "yarn"):
    config.rope_parameters = hf_export.rope_keys(source.config.rope)["rope_parameters"]
  model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), config=config, dtype=torch.float32, **how)
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name == "rope_freqs.weight":  # llama3 scaling, which transformers ignores too
      model.model.rotary_emb.inv_freq /= torch.tensor(tensor.data)
  return model


# Kind of a source -> function that runs it: (source, token ids [T]) -> logits, float32 [T, vocabulary].
_RUNNERS: Mapping[str, Callable[[Source, np.ndarray], np.ndarray]] = {
  "huggingface": _run_transformers,
  "gguf": _run_transformers,
}


def report(found: Comparison, tolerance: float) -> None:
  """Prints how far the logits of two models are apart.

  Args:
    found: result of `compare`.
    tolerance: largest allowed difference between corresponding logits, in standard deviations of the source's logits.

  Raises:
    ConversionError: the largest difference exceeds the tolerance, or is NaN.
  """
  print(f"After each of {found.num_tokens} tokens, all logits, in float32:")
  print(f"  largest difference   {found.largest:.2e}")
  print(f"  mean difference      {found.mean:.2e}")
  print(f"  standard deviation   {found.deviation:.2e}")
  print(f"  same next token      {found.agreeing} of {found.num_tokens}")
  # `not <=` rather than `>`: a difference of NaN must fail.
  if not found.largest <= tolerance * found.deviation:
    apart = found.largest / found.deviation if found.deviation else math.inf
    raise ConversionError(
      f"The models differ by {apart:.2e} standard deviations of the logits, more than the tolerance of {tolerance:g}."
      + " A memory holds on to the tokens with the largest scores, and of two nearly alike ones rounding takes either: "
      "if the next tokens are the same, --tolerance=0.1 allows for that." * found.chooses
    )
  print(f"They are the same, to {tolerance:g} standard deviations of the logits.")


def define_flags() -> None:
  """Defines the program's flags; not done on import, since the importer may have flags of the same names."""
  flags.DEFINE_string("source", None, "Model that was converted, as hf_to_orbax was given it.", required=True)
  flags.DEFINE_string("checkpoint", None, "Model directory that hf_to_orbax wrote.", required=True)
  flags.DEFINE_float(
    "tolerance",
    1e-3,
    "Largest allowed difference between corresponding logits, in standard deviations of the source's logits.",
    lower_bound=0,
  )
  flags.DEFINE_string(
    "text", None, f"UTF-8 text file whose first {MAX_TOKENS} tokens both models run on; unset: Python's documentation."
  )


def main() -> None:
  """Runs the program with its flags; defines and parses these flags if an importer has not."""
  given = flags_of(define_flags, "source")
  try:
    text = None if given.text is None else local(given.text).read_text("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ConversionError(f"{given.text}: not UTF-8 text: {error}.") from error
  report(compare(given.source, given.checkpoint, text), given.tolerance)


if __name__ == "__main__":
  define_flags()
  run(main)
