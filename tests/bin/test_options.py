"""An option that a recipe does not have is named, with those that are near."""

import functools
import re
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import tiny
from supra_jax.bin.options import find_base, unknown_option
from supra_jax.core.schema import documented
from supra_jax.training.config import TrainConfig
from tests.support import programs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
  config_flags.DEFINE_config_file("recipe", None, "Of this test.", lock_config=True)
  yield f"--recipe={ROOT / 'configs' / 'tiny.py'}"
  delattr(flags.FLAGS, "recipe")


@pytest.mark.compat
@pytest.mark.parametrize(
  "option, fragments",
  [
    ("recipe.checkpoint_every=3", ("has no option checkpoint_every. Nearest", "save_every", "keep_checkpoints")),
    ("recipe.optimizer.lr=1e-4", ("has no option optimizer.lr. Nearest to lr: ", "learning_rate")),
    ("recipe.optimiser.learning_rate=1", ("has no option optimiser.learning_rate. Nearest to optimiser: optimizer,",)),
  ],
)
def test_unknown(recipe, option, fragments):
  said = unknown_option(["train", recipe, "--workdir=x", f"--{option}"])
  assert said.startswith(f"--{option.split('=')[0]}: {ROOT / 'configs' / 'tiny.py'} has no option ")
  assert all(fragment in said for fragment in fragments), said


@pytest.mark.parametrize(
  "options",
  [[], ["--recipe.num_steps=3"], ["--recipe.num_steps.x=3"], ["--other.x=3"], ["--recipe=absent.py", "--recipe.x=3"]],
)
def test_not_for_this_to_say(recipe, options):
  assert unknown_option(["train", recipe, "--workdir=x", *options]) is None


@pytest.mark.compat
def test_the_program(tmp_path):
  recipe = ROOT / "configs" / "tiny.py"
  flags = [f"--config={recipe}", f"--workdir={tmp_path}", "--config.optimizer.lr=1e-4"]
  done = programs.run("supra_jax.bin.train", *flags)
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: --config.optimizer.lr: {recipe} has no option optimizer.lr. Nearest to lr: ")


@pytest.mark.parametrize("help_flag", ["--help", "--helpshort"])
def test_help_is_no_error(help_flag):
  done = programs.run("supra_jax.bin.linearize", help_flag)
  assert done.returncode == 0 and "--state_bytes" in done.stdout and not done.stderr
  assert programs.run("supra_jax.bin.linearize", "--no_such_flag").returncode == 1


def test_help_lists_the_options_of_a_recipe():
  recipe = ROOT / "configs" / "tiny.py"
  done = programs.run("supra_jax.bin.train", f"--config={recipe}", "--help")
  assert done.returncode == 0 and f"Options of --config, with the values of {recipe}:" in done.stdout
  listed = dict(re.findall(r"^  --config\.(\S+?)=(.*)\n      \S", done.stdout, re.MULTILINE))
  config = TrainConfig.from_mapping(tiny.get_config().to_dict())
  assert len(listed) == len(documented(TrainConfig)) > 40
  for option, value in listed.items():
    assert str(functools.reduce(getattr, option.split("."), config)) == value, option


def test_a_recipe_finds_its_base_from_anywhere(monkeypatch):
  monkeypatch.setattr(sys, "path", [])
  find_base(["train", "--workdir=configs/x.py", f"--config={ROOT / 'configs' / 'tiny.py'}"])
  assert sys.path == [str(ROOT)]
