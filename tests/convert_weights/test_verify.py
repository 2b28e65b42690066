"""verify tells a right conversion from a wrong one, with transformers as the judge."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CASES, GOLDEN, copy_case, source_tensors, write_gguf

from convert_weights import orbax_to_hf, verify
from convert_weights.errors import ConversionError
from convert_weights.hf_to_orbax import convert
from convert_weights.open_source import open_source
from supra_jax.experiments.tiny import write_checkpoint
from supra_jax.model.registry import layer
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
  done = programs.run("convert_weights.verify", f"--source={source}", f"--checkpoint={tmp_path / 'out'}")
  assert done.returncode == 1 and "more than the tolerance of 0.001" in done.stderr
  assert "Traceback" not in done.stderr and "512 of 512" not in done.stdout and "They are" not in done.stdout
  verify.report(verify.compare(source, tmp_path / "out"), 1000)
  with pytest.raises(ConversionError, match="the tolerance"):
    verify.report(dataclasses.replace(found, largest=np.nan), 1e-3)
  with pytest.raises(
    ConversionError, match="differ by inf standard deviations"
  ):  # of a source whose logits are all alike
    verify.report(dataclasses.replace(found, largest=1.0, deviation=0.0), 1e-3)


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
    with pytest.raises(ConversionError, match=r"needs torch: pip install 'supra_jax\[torch\]'"):
      verify.compare(source, tmp_path / "out")
  monkeypatch.setattr(verify, "_RUNNERS", {})
  with pytest.raises(ConversionError, match=r"transformers has no model for a source of the kind 'huggingface'"):
    verify.compare(source, tmp_path / "out")


def other_weights(case: str):
  """The tensors of a golden case with the k of two layers exchanged: every shape fits."""
  tensors = source_tensors(case)
  names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
  return tensors | {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}


@pytest.mark.parametrize("name", ["step2000.safetensors", "step2000.bin", "last.pt", "last.pth"])
def test_the_very_file_that_is_given_runs(name, transformers, tmp_path):
  """Beside a model.safetensors with other weights, which transformers takes where it is given the directory."""
  import torch

  source = copy_case("mistral_gqa", tmp_path / "source")
  tensors = other_weights("mistral_gqa")
  if name.endswith(".safetensors"):
    save_file(tensors, source / name)
  else:
    state = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    torch.save({"state_dict": state, "epoch": 3} if name == "last.pt" else state, source / name)
  convert(source / name, tmp_path / "of_file")
  convert(source, tmp_path / "of_directory")
  for given, checkpoint, right in (
    (source / name, "of_file", True),
    (source / name, "of_directory", False),
    (source, "of_directory", True),
    (source, "of_file", False),
  ):
    found = verify.compare(given, tmp_path / checkpoint)
    assert (found.largest < 1e-4 * found.deviation) == right, (given, checkpoint)
    assert (found.agreeing == found.num_tokens) == right


@pytest.mark.parametrize("stem, ending", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_several_files_with_an_index(stem, ending, transformers, tmp_path):
  import torch

  source = copy_case("llama_mha_untied", tmp_path / "source")
  tensors = source_tensors("llama_mha_untied")
  (source / "model.safetensors").unlink()
  names, weight_map = list(tensors), {}
  for part in (0, 1):
    file = f"{stem}-{part}.{ending}"
    held = {name: tensors[name] for name in names[part::2]}
    weight_map |= dict.fromkeys(held, file)
    if ending == "bin":
      torch.save({name: torch.from_numpy(tensor) for name, tensor in held.items()}, source / file)
    else:
      save_file(held, source / file)
  (source / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
  convert(source, tmp_path / "out")
  found = verify.compare(source, tmp_path / "out")
  assert found.largest < 1e-4 * found.deviation


@pytest.mark.parametrize("mixer", [layer("supra_window"), layer("memory", retained=(40,))], ids=lambda x: x.mixer)
def test_an_export_with_code_of_its_own(mixer, transformers, tmp_path):
  """Its code in the directory is not run: that may be anyone's. A memory's state is not rounded here."""
  model = write_checkpoint(tmp_path / "model", mixer)
  orbax_to_hf.convert(model, tmp_path / "export")
  (tmp_path / "export" / "modeling_supra.py").write_text("raise SystemExit('This was run.')")
  found = verify.compare(tmp_path / "export", model)
  assert found.largest < 1e-4 * found.deviation and found.num_tokens == found.agreeing == verify.MAX_TOKENS
  other = write_checkpoint(tmp_path / "other", mixer, seed=1)
  found = verify.compare(tmp_path / "export", other)
  assert found.largest > 0.1 * found.deviation


def test_gguf_with_the_frequencies_of_llama3(transformers, tmp_path):
  """transformers passes over rope_freqs.weight; here against its own model, built with llama3 scaling."""
  import torch

  factors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
  plain = open_source(write_gguf(tmp_path / "plain.gguf"))
  path = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
  tokens = np.arange(90)
  want_model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_gqa_tied", dtype=torch.float32).eval()
  want_model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
  with torch.no_grad():
    want = want_model(torch.from_numpy(tokens[None])).logits[0].numpy()
  got = verify._run_transformers(dataclasses.replace(plain, weight_files=[path]), tokens)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(verify._run_transformers(plain, tokens) - want).max() > 0.01


def test_what_transformers_refuses_is_one_line(transformers, tmp_path):
  source = copy_case("llama_gqa_tied", tmp_path / "source", pad_token_id=[1])
  convert(source, tmp_path / "out")
  with pytest.raises(ConversionError, match=r"source: transformers does not run it: ") as caught:
    verify.compare(source, tmp_path / "out")
  assert "\n" not in str(caught.value)


def test_openlm_is_refused_by_name(start, tmp_path):
  orbax_to_hf.convert(start, tmp_path / "openlm", "openlm")
  with pytest.raises(ConversionError, match="transformers has no model for a source of the kind 'openlm'"):
    verify.compare(tmp_path / "openlm", start)


@pytest.mark.parametrize("which", ["source", "checkpoint"])
def test_logits_that_are_not_finite_are_no_result(which, transformers, tmp_path):
  """The first norm of layer 0 overflows where a token has something in the first feature, as one token alone has."""
  source = copy_case("llama_mha_untied", tmp_path / "source")
  convert(source, tmp_path / "good")
  tensors = source_tensors("llama_mha_untied")
  tokens = np.random.default_rng(0).integers(97, size=verify.MAX_TOKENS)  # those of a model without a tokenizer
  only = tokens[40]
  at = tokens.tolist().index(only) + 1
  tensors["model.embed_tokens.weight"][:, 0] = np.where(np.arange(97) == only, 100, 0)
  tensors["model.layers.0.input_layernorm.weight"][0] = 3e38
  save_file(tensors, source / "model.safetensors")
  convert(source, tmp_path / "bad")
  said = {
    "source": r"source: its logits are not finite where transformers runs it",
    "checkpoint": rf"bad: The logits after token {at} of the text \(id {only}\) are not finite; layer 0 is the first",
  }
  with pytest.raises(ConversionError, match=said[which]):
    verify.compare(source, tmp_path / {"source": "good", "checkpoint": "bad"}[which])
