"""Mamba's block against transformers' MambaForCausalLM, and such models in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch_exports import close, load, tokens_of  # noqa: E402

import supra_jax  # noqa: E402
from convert_weights import mamba  # noqa: E402
from convert_weights.errors import ConversionError  # noqa: E402
from convert_weights.hf_to_orbax import convert  # noqa: E402
from convert_weights.names import parameters  # noqa: E402
from convert_weights.orbax_to_hf import convert as export  # noqa: E402
from convert_weights.verify import compare  # noqa: E402
from supra_jax.experiments.tiny import write_checkpoint  # noqa: E402
from supra_jax.inference.engine import generate_tokens  # noqa: E402
from supra_jax.model.mixers.mamba import MambaConfig  # noqa: E402
from supra_jax.model.registry import layers  # noqa: E402
from supra_jax.storage.model_directory import load_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {
  "as published": {},
  "others": {
    "state_size": 5,
    "conv_kernel": 3,
    "expand": 3,
    "time_step_rank": 7,
    "use_bias": True,
    "use_conv_bias": False,
    "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-3,
  },
}


@pytest.fixture(scope="module", params=SHAPES)
def models(request, tmp_path_factory):
  """(theirs, ours, their directory, ours)."""
  directory = tmp_path_factory.mktemp("mamba")
  torch.manual_seed(0)
  config = transformers.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=3, **SHAPES[request.param])
  theirs = transformers.MambaForCausalLM(config).eval()
  with torch.no_grad():  # so that no gain is 1 and no bias is 0
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  theirs.save_pretrained(directory / "theirs")
  convert(directory / "theirs", directory / "ours")
  return theirs, supra_jax.load(directory / "ours"), directory / "theirs", directory / "ours"


def test_logits_at_once_and_token_by_token(models):
  theirs, ours, *_ = models
  tokens = tokens_of(ours.config, length=100)
  with torch.no_grad():
    want = theirs(torch.from_numpy(tokens)).logits
    close(ours(tokens)[0], want)
    # With a cache of theirs, one token at a time.
    cache, steps = None, []
    for t in range(20):
      output = theirs(torch.from_numpy(tokens[:, t : t + 1]), use_cache=True, **({} if cache is None else cache))
      name = "cache_params" if "cache_params" in output else "past_key_values"
      cache, steps = {name: output[name]}, [*steps, output.logits]
  state, logits = None, []
  for t in range(20):
    step, state = ours(tokens[:, t : t + 1], state)
    logits.append(step)
  close(jnp.concatenate(logits, 1), torch.cat(steps, 1))
  # Cuts against our own uncut reading.
  first, state = ours(tokens[:, :33])
  second, _ = ours(tokens[:, 33:], state)
  close(jnp.concatenate([first, second], 1), want)


def test_gradients(models):
  theirs, ours, *_ = models
  tokens = tokens_of(ours.config, length=65)

  def loss(params):
    logits, _ = ours.model.apply({"params": params}, tokens, method="logits")
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

  got = jax.grad(loss)(load_model(models[3]).params)
  theirs.zero_grad()
  theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
  want = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
  for parameter in parameters(ours.config):
    leaf = got
    for key in parameter.path:
      leaf = leaf[key]
    leaf = np.swapaxes(leaf, -1, -2) if parameter.transposed else np.asarray(leaf)
    np.testing.assert_allclose(leaf, want[parameter.hf], rtol=1e-3, atol=1e-5, err_msg=parameter.hf)


def test_generating(models):
  theirs, ours, *_ = models
  prompt = [9, 3, 40, 12]
  told = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
  with torch.no_grad():
    want = theirs.generate(torch.tensor([prompt]), **told)[0, 4:].tolist()
  assert list(generate_tokens(ours.model, ours.params, prompt, max_new_tokens=12)) == want


def test_there_and_back(models, tmp_path):
  theirs, ours, source, directory = models
  export(directory, tmp_path / "hf")
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["architectures"] == ["MambaForCausalLM"] and "auto_map" not in config
  tokens = torch.from_numpy(tokens_of(ours.config))
  with torch.no_grad():
    torch.testing.assert_close(load(tmp_path / "hf")(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
  convert(tmp_path / "hf", tmp_path / "again")
  first, second = load_model(directory), load_model(tmp_path / "again")
  assert first.config == second.config
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  found = compare(source, directory)
  assert found.largest < 1e-4


def test_a_model_from_scratch(tmp_path):
  """Whose config has other heads, which Mamba has not."""
  write_checkpoint(tmp_path / "ours", "mamba", norm="rms_norm")
  export(tmp_path / "ours", tmp_path / "hf")
  ours = supra_jax.load(tmp_path / "ours")
  tokens = tokens_of(ours.config)
  with torch.no_grad():
    close(ours(tokens)[0], load(tmp_path / "hf")(torch.from_numpy(tokens)).logits)
  convert(tmp_path / "hf", tmp_path / "again")
  close(supra_jax.load(tmp_path / "again")(tokens)[0], ours(tokens)[0], 0)


def test_what_older_checkpoints_call_the_embedding(models, tmp_path):
  source = models[2]
  tensors = load_file(source / "model.safetensors")
  tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
  tmp_path.joinpath("config.json").write_bytes((source / "config.json").read_bytes())
  save_file(tensors, tmp_path / "model.safetensors")
  convert(tmp_path, tmp_path / "ours")
  jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "ours").params, load_model(models[3]).params)


def test_what_is_refused(random_params, tmp_path):
  values = {"model_type": "mamba", "vocab_size": 9, "hidden_size": 8, "hidden_act": "gelu", "rms_norm": False, "x": 1}
  with pytest.raises(
    ConversionError, match=r"(?s)hidden_act.*num_hidden_layers: missing.*rms_norm|rms_norm.*x=1"
  ) as error:
    mamba.model_config(values, {}, "config.json")
  assert all(name in str(error.value) for name in ("hidden_act", "rms_norm", "num_hidden_layers", "x=1"))
  write_checkpoint(tmp_path / "hybrid", "mamba", layers=layers(("mamba", "supra")))
  with pytest.raises(ConversionError, match="Layer 0 is a 'mamba' layer, which has no names in other formats"):
    export(tmp_path / "hybrid", tmp_path / "hf")


def test_a_published_config():
  """That of state-spaces/mamba-130m-hf, with all its keys."""
  values = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
  }  # fmt: skip
  made = mamba.model_config(values, {}, "config.json")
  assert made.layers == (MambaConfig(time_step_rank=48),) * 24 and made.tie_embeddings and made.eos_token_ids == (0,)
  count = sum(np.prod(parameter.shape) for parameter in parameters(made))
  assert 129e6 < count < 130e6
  ours = mamba.config_json(made)
  assert {key: ours[key] for key in ours if key != "tie_word_embeddings"}.items() <= values.items()
