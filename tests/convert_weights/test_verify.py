"""verify tells a right conversion from a wrong one, with transformers as the judge."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CASES, copy_case, write_gguf

from convert_weights import verify
from convert_weights.errors import ConversionError
from convert_weights.hf_to_orbax import convert


@pytest.fixture
def transformers():
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
def test_right(case, transformers, tmp_path):
  source = copy_case(case, tmp_path / "source")
  convert(source, tmp_path / "out")
  found = verify.compare(source, tmp_path / "out")
  assert found.num_tokens == found.agreeing == verify.MAX_TOKENS
  assert 0 < found.mean < found.largest < 1e-4 * found.deviation


def test_gguf(transformers, tmp_path):
  source = write_gguf(tmp_path / "m.gguf")
  convert(source, tmp_path / "out")
  found = verify.compare(source, tmp_path / "out")
  assert found.largest < 1e-4 * found.deviation


def test_wrong(transformers, tmp_path, capsys):
  """The k of two layers exchanged: every shape fits."""
  source = copy_case("llama_gqa_tied", tmp_path / "source")
  convert(source, tmp_path / "out")
  found = verify.compare(source, tmp_path / "out")
  verify.report(found, 1e-3)
  said = capsys.readouterr().out
  assert "512 of 512" in said and "They are the same" in said

  tensors = load_file(source / "model.safetensors")
  names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
  tensors |= {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
  save_file(tensors, source / "model.safetensors")
  # As a program: what it prints, and that it fails.
  command = [sys.executable, "-m", "convert_weights.verify", f"--source={source}", f"--checkpoint={tmp_path / 'out'}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1 and "more than the tolerance of 0.001" in done.stderr
  assert "Traceback" not in done.stderr and "512 of 512" not in done.stdout and "They are" not in done.stdout
  verify.report(verify.compare(source, tmp_path / "out"), 1000)
  with pytest.raises(ConversionError, match="the tolerance"):
    verify.report(dataclasses.replace(found, largest=np.nan), 1e-3)


def test_what_it_cannot_do_is_said(tmp_path, monkeypatch):
  source = copy_case("llama_gqa_tied", tmp_path / "source")
  convert(source, tmp_path / "out")
  other = copy_case("llama_gqa_tied", tmp_path / "other", vocab_size=98)
  tensors = load_file(other / "model.safetensors")
  tensors["model.embed_tokens.weight"] = np.ones((98, 48), np.float32)
  save_file(tensors, other / "model.safetensors")
  with pytest.raises(ConversionError, match=r"was not converted from .*: it has 97 logits, not 98"):
    verify.compare(other, tmp_path / "out")
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "torch", None)  # as where it is not installed
    with pytest.raises(ConversionError, match=r"takes torch: pip install 'supra_jax\[torch\]'"):
      verify.compare(source, tmp_path / "out")
  monkeypatch.setattr(verify, "_RUNNERS", {})
  with pytest.raises(ConversionError, match=r"transformers has no model for a source of the kind 'huggingface'"):
    verify.compare(source, tmp_path / "out")
