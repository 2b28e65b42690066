"""Draws a model from scratch: `python -m supra_jax.bin.init --preset=NAME --mixer=NAME --tokenizer=DIR --output=DIR`.

Training it is `supra_jax.bin.train`, as ever.
"""

from __future__ import annotations

import jax
from absl import flags

from supra_jax.bin.any_tokenizer import any_tokenizer
from supra_jax.bin.entry import run
from supra_jax.bin.mixer_flag import HELP, mixer_of, settings
from supra_jax.core.files import occupied, place
from supra_jax.experiments.scratch import config_of, draw
from supra_jax.model.presets import PRESETS
from supra_jax.storage.model_directory import save_model

_PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "Shape of the model.", required=True)
_MIXER = flags.DEFINE_string("mixer", "supra", f"Mixer of all layers, {HELP}")
_MODEL = "Model whose tokenizer is taken: a directory, or owner/name on the hub; or a directory with a tokenizer alone."
_TOKENIZER = flags.DEFINE_string("tokenizer", None, _MODEL, required=True)
_SET = flags.DEFINE_string("set", "", "Fields of the shape that differ, as in hidden_size=256,num_layers=8.")
_SEED = flags.DEFINE_integer("seed", 0, "Seeds the parameters.", lower_bound=0, upper_bound=2**32 - 1)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to make.", required=True)


def main() -> None:
  if occupied(place(_OUTPUT.value)):
    raise ValueError(f"{_OUTPUT.value} already exists. Remove it or choose another output directory.")
  found = any_tokenizer(_TOKENIZER.value)
  config = config_of(_PRESET.value, mixer_of(_MIXER.value), found.tokenizer, settings(_SET.value))
  params = draw(config, _SEED.value)
  source = {"drawn": {"preset": _PRESET.value, "seed": _SEED.value}}
  save_model(_OUTPUT.value, config=config, params=params, tokenizer_files=found.files, source=source)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f"{_OUTPUT.value}: {count:,} parameters, {config.num_layers} layers, a vocabulary of {config.vocab_size:,}.")


if __name__ == "__main__":
  run(main)
