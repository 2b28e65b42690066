"""The README.md of an export: what model hubs read of it, what it says, and that its load lines run."""

import json
import re
import shutil

import gguf
import pytest
from huggingface_hub import ModelCard
from tiny_checkpoints import GOLDEN, write_gguf

from convert_weights import hf_to_orbax
from convert_weights.model_card import stated_license
from convert_weights.open_source import open_source
from convert_weights.orbax_to_hf import convert
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Window
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import layer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STATED = {"license": "other", "license_name": "ours", "license_link": "LICENSE"}
# What `train` adds; tests/training/test_train.py holds it to that.
TRAINED = {
  "train_config": {"num_steps": 60, "distill_from": "/a/path/of/mine"},
  "tokens_trained": 61440,
  "heldout_nll": {"before": 3.11069, "after": 2.5},
}


@pytest.fixture(scope="module")
def linearized(tmp_path_factory):
  """A model directory of a source that has a card of its own, and what that became."""
  directory = tmp_path_factory.mktemp("card")
  source = shutil.copytree(GOLDEN / "llama_gqa_tied", directory / "small")
  lines = "".join(f"{key}: {value}\n" for key, value in STATED.items())
  (source / "README.md").write_text(f"---\n{lines}base_model: someone/else\n---\n# A model\n")
  hf_to_orbax.convert(source, directory / "orbax")
  linearize_checkpoint(directory / "orbax", directory / "linearized", Window(5), layers=[1])
  return directory / "linearized"


def card_of(checkpoint, directory, **how):
  convert(checkpoint, directory, **how)
  return ModelCard.load(directory / "README.md")


def test_a_linearised_model(linearized, tmp_path):
  card = card_of(linearized, tmp_path / "out")
  assert card.data.to_dict() == {
    "library_name": "transformers",
    "license": "other",
    "license_name": "ours",
    "pipeline_tag": "text-generation",
    "tags": ["supra", "linear-attention"],
  }
  files = json.loads((linearized / "source.json").read_text())["linearized_from"]["files"]
  for said in (
    f"# small, linearised\n\n- Base model: `small`, sha256 `{files[0]['sha256']}`; stored as F32.\n- Linearised",
    "window, the base model's own softmax attention over the last 5 tokens and a text's first 4",
    "- Layers 0: softmax attention over all tokens.\n- Layers 1: softmax attention over the last 5 tokens and",
    "trust_remote_code=True",
    "vLLM and llama.cpp, cannot run",
    "hf upload USER/NAME .",
  ):
    assert said in card.text
  assert "does not grow" not in card.text and "Trained" not in card.text and "someone/else" not in card.content


def test_a_model_of_the_hub_that_was_trained(linearized, tmp_path):
  checkpoint = shutil.copytree(linearized, tmp_path / "trained")
  source = json.loads((checkpoint / "source.json").read_text())
  source["linearized_from"]["name"] = f"owner/base@{COMMIT}"
  (checkpoint / "source.json").write_text(json.dumps({"trained_from": source, **TRAINED}))
  card = card_of(checkpoint, tmp_path / "out", dtype="bfloat16")
  assert card.data.base_model == "owner/base"
  assert card.data.to_dict()["license_link"] == "https://huggingface.co/owner/base/blob/main/LICENSE"
  assert f"[owner/base](https://huggingface.co/owner/base) at commit `{COMMIT}`" in card.text
  wanted = (
    "- Trained on 61,440 tokens in 60 steps by distillation; held-out loss in nats a token: 3.1107 before, 2.5000"
  )
  assert wanted in card.text and "/a/path" not in card.text
  assert re.search(r"- [\d,]+ parameters, bfloat16\.", card.text)


@pytest.mark.parametrize(
  "step, said",
  [
    ({"start": {"method": "calibrated", "tokens": 4096}}, "calibrated by least squares, calibration_tokens=4096"),
    ({"start": {"method": "window", "window": 5, "sinks": 0}}, "over the last 5 tokens, beside linear attention"),
    ({"start": {"method": "identity"}}, "identity, phi(x) = relu(x)"),
    ({"start": {"method": "random", "seed": 3}}, "random phi, the paper's start"),
    # As source.json had it before there were starts.
    ({"phi": "identity", "calibration": {"tokens": 4096}}, "calibrated by least squares, calibration_tokens=4096"),
    ({"phi": "identity", "window": 5, "sinks": 2}, "over the last 5 tokens and a text's first 2, beside linear"),
    ({"phi": "identity", "window": 5}, "over the last 5 tokens, beside linear attention"),
    ({"phi": "identity", "window": None, "calibration": None}, "identity, phi(x) = relu(x)"),
    ({"phi": "random", "window": None}, "random phi, the paper's start"),
  ],
)
def test_how_the_layers_began(linearized, step, said, tmp_path):
  checkpoint = shutil.copytree(linearized, tmp_path / "model")
  source = json.loads((checkpoint / "source.json").read_text())
  ways = {"": None} | ({", and layers 0 stayed as they were": {"layers": [0]}} if "calibrated" in said else {})
  for more, kept in ways.items():
    before = {"linearized_from": source["linearized_from"], "kept_softmax": kept}
    (checkpoint / "source.json").write_text(json.dumps(before | step))
    text = card_of(checkpoint, tmp_path / f"out{bool(kept)}").text
    (line,) = (line for line in text.splitlines() if line.startswith("- Linearised"))
    assert said in line and line.endswith(f"{more}."), line


def test_a_bounded_memory(linearized, tmp_path):
  mixers = layer("memory", retained=(9, 40)), layer("memory", retained=(7,), sinks=0, chunk=1, score="random")
  config = ModelConfig.from_json((linearized.parent / "orbax" / "config.json").read_text()).replace(layers=mixers)
  checkpoint = shutil.copytree(linearized.parent / "orbax", tmp_path / "orbax")
  (checkpoint / "config.json").write_text(config.to_json())
  step = {"linearized_from": {}, "mixer": {"mixer": "memory"}, "start": {"method": "memory"}, "calibrated_on": 6144}
  (checkpoint / "source.json").write_text(json.dumps(step))
  card = card_of(checkpoint, tmp_path / "out")
  assert card.data.to_dict()["tags"] == ["supra"]
  for said in (
    "# A language model, with a bounded memory\n",
    "- Given a bounded memory, whose size in each head was found on 6,144 tokens.\n",
    "- Layers 0: softmax attention over the last 17 to 32 tokens, a text's first 4, and in each head 9 to 40 others, "
    "which have received most attention.\n",
    "- Layers 1: softmax attention over the last 17 tokens, and in each head 7 others, which are drawn at random.\n",
    "- Its memory does not grow with the text.\n",
  ):
    assert said in card.text


def test_nothing_is_known(linearized, tmp_path):
  checkpoint = shutil.copytree(linearized.parent / "orbax", tmp_path / "orbax")
  (checkpoint / "source.json").write_text("{}")
  card = card_of(checkpoint, tmp_path / "out")
  assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
  assert "Base model" not in card.text and "trust_remote_code" not in card.text and "vLLM" not in card.text
  assert "linear_open_lm" in card_of(checkpoint, tmp_path / "openlm", format="openlm").text


def test_licences(linearized, tmp_path):
  source = linearized.parent / "small"
  assert stated_license(open_source(source)) == STATED
  assert stated_license(open_source(source / "model.safetensors")) == STATED
  shutil.copytree(source, tmp_path / "other")
  for text in ("", "# No metadata", "---\nlicense: [\n---\n", "---\nlicense:\n---\n"):
    (tmp_path / "other" / "README.md").write_text(text)
    assert stated_license(open_source(tmp_path / "other")) == {}


def test_the_licence_in_a_gguf_file(tmp_path, monkeypatch):
  header = gguf.GGUFWriter.write_header_to_file

  def with_license(self):
    self.add_license("apache-2.0")
    header(self)

  monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_license)
  path = write_gguf(tmp_path / "model.gguf")
  assert stated_license(open_source(path)) == {"license": "apache-2.0"}
