"""The tokenizer of a model as it was released packs what the converted model trains on."""

from __future__ import annotations

import json

import pytest

from convert_weights.errors import ConversionError
from convert_weights.hf_to_orbax import convert
from convert_weights.orbax_to_hf import convert as export
from supra_jax.bin.any_tokenizer import any_tokenizer
from supra_jax.data.packed import check_packed, tokenizer_fingerprint
from supra_jax.experiments import tiny
from tests.support import programs


@pytest.fixture
def released(tmp_path):
  """A Llama in transformers' form, with a tokenizer."""
  export(tiny.write_checkpoint(tmp_path / "made", "softmax"), tmp_path / "released")
  return tmp_path / "released"


def test_a_released_model_packs_for_the_converted_one(released, tmp_path):
  convert(released, tmp_path / "model")
  theirs, ours = any_tokenizer(str(released)), any_tokenizer(str(tmp_path / "model"))
  assert theirs.vocab_size == ours.vocab_size
  assert tokenizer_fingerprint(theirs.tokenizer) == tokenizer_fingerprint(ours.tokenizer)
  (released / "model.safetensors").unlink()  # the weights are not read
  text = tiny.write_text(tmp_path / "text.jsonl")
  flags = [f"--input={text}", f"--tokenizer={released}", f"--output={tmp_path}/out", "--sequence_length=32"]
  ran = programs.run("supra_jax.bin.prepare_data", *flags)
  assert ran.returncode == 0, ran.stderr
  check_packed(tmp_path / "out/train", vocab_size=ours.vocab_size, tokenizer=ours.tokenizer)


def test_a_tokenizer_alone(released, tmp_path):
  (tmp_path / "alone").mkdir()
  (tmp_path / "alone/tokenizer.json").write_bytes((released / "tokenizer.json").read_bytes())
  found = any_tokenizer(str(tmp_path / "alone"))
  assert found.vocab_size == found.tokenizer.vocab_size == 320 and list(found.files) == ["tokenizer.json"]
  (released / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 400}))
  other = any_tokenizer(str(released))
  assert other.vocab_size == 320 and other.tokenizer.eos_ids == (0,)


def test_what_is_no_model(released, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ConversionError, match=r"empty: holds no tokenizer"):
    any_tokenizer(str(tmp_path / "empty"))
  with pytest.raises(ConversionError, match=r"not/there/x does not exist\. Give a directory"):
    any_tokenizer("not/there/x")
  (released / "tokenizer.json").unlink()
  with pytest.raises(ConversionError, match="none of the vocabularies that are read"):
    any_tokenizer(str(released))
