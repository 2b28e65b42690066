"""Uptraining end to end: it learns, leaves what it promises, trains what it is told to, refuses what does not fit."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import supra_jax
from benchmarks import runs
from benchmarks.runs import losses, make_config
from supra_jax.core.sharding import make_mesh
from supra_jax.data import loading
from supra_jax.experiments import tiny
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Lolcats
from supra_jax.model.adapters import AdapterConfig
from supra_jax.model.registry import new_parameters
from supra_jax.model.stacking import stack_layers, unstack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives import layer_losses
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.storage.run_states import RunStates
from supra_jax.training import loop as train
from supra_jax.training import setup as train_setup
from supra_jax.training.metrics import read_metrics
from supra_jax.training.workdir import CONFIG_FILE
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def learned(start, text, tmp_path_factory):
  """(workdir, summary) of a run whose options are the defaults."""
  workdir = tmp_path_factory.mktemp("learned")
  return workdir, train.train(make_config(start, text), workdir, teacher_nll=3.0)


@pytest.fixture(scope="module")
def once(start, text, tmp_path_factory) -> Path:
  """The workdir of a run of one step, which leaves its state; to copy before anything is changed there."""
  workdir = tmp_path_factory.mktemp("once")
  train.train(make_config(start, text, num_steps=1, save_every=1), workdir)
  return workdir


@pytest.mark.compat
def test_learns_and_leaves_all_it_promises(start, text, learned):
  workdir, summary = learned
  _leaves_all_it_promises(make_config(start, text), workdir, summary)


def test_so_it_does_in_bfloat16_with_documents_apart_and_microbatches(start, text, tmp_path):
  """And a trace, where it is asked for."""
  changes = {"dtype": "bfloat16", "remat": "none", "data": {"documents": "separate"}, "microbatches": 2}
  config = make_config(start, text, **changes)
  _leaves_all_it_promises(config, tmp_path, train.train(config, tmp_path, teacher_nll=3.0, profile_steps=2))

  (path,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  calls = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name", "").startswith("PjitFunction(step)"))
  # A call is told by two layers of jax, one within the other.
  outermost = [span for i, span in enumerate(calls) if all(span[0] >= end for _, end in calls[:i])]
  assert len(outermost) == 2
  # And what the compiled step did, operation by operation.
  assert len({e["name"] for e in events if e.get("args", {}).get("hlo_module") == "jit_step"}) > 50


def _leaves_all_it_promises(config, tmp_path, summary):
  assert summary.nll_after < summary.nll_before - 0.5
  assert summary.tokens_trained == 12 * 4 * 64
  records = read_metrics(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
  assert records[0]["heldout_nll"] == summary.nll_before and records[-1]["heldout_nll"] == summary.nll_after
  source = json.loads((tmp_path / "checkpoint" / "source.json").read_text())  # for the card of an export
  assert source["tokens_trained"] == summary.tokens_trained
  assert source["heldout_nll"] == {"before": summary.nll_before, "after": summary.nll_after}
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes()
  (record,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
  assert record["command"] == sys.argv and record["config"]["batch_size"] == 4

  lm = supra_jax.load(tmp_path / "checkpoint")
  # The exported model is the trained one: it has the held-out loss that the run ended with.
  nll = train_setup.heldout_nll(lm.model, lm.params, tmp_path / "data/heldout", batch_size=4, max_rows=8)
  assert nll == pytest.approx(summary.nll_after, abs=0.02 if config.dtype == "bfloat16" else 1e-5)
  assert lm.generate("The ", max_new_tokens=4)


def _changed(workdir: Path, start: Path) -> set[str]:
  """Paths below their layer of the parameters of which any bit changed."""
  return _differing(load_model(workdir / "checkpoint").params, load_model(start).params)


def _differing(after, before) -> set[str]:
  flat = jax.tree_util.tree_leaves_with_path
  before, after = flat(before), flat(after)
  return {
    "/".join(key.key for key in path if not key.key.startswith("layers_"))
    for (path, old), (_, new) in zip(before, after, strict=True)
    if not np.array_equal(old, new)
  }


def test_new_weights_train_alone_at_first(start, text, tmp_path):
  """And then all, as long as the run goes on."""
  config = make_config(start, text, num_steps=4, new_weights_steps=3, save_every=3)
  train.train(config, tmp_path)
  phi = {f"self_attn/{name}/{part}" for name in ("feature_map", "feature_map_kv") for part in ("kernel", "bias")}
  changed = _changed(tmp_path, start)
  assert changed > phi and {"embed_tokens/embedding", "mlp/up_proj/kernel"} < changed

  shutil.rmtree(tmp_path / "training/4")
  before, mesh = load_model(start), make_mesh(devices=jax.devices()[:1])
  shapes = train_setup.make_train_step(config, before.config).state_shapes(mesh)
  step, state, _ = RunStates(tmp_path / "training", keep=2).restore(shapes)
  assert (step, _differing(unstack_layers(state.params, before.config), before.params)) == (3, phi)


def test_new_weights_have_a_rate_of_their_own(start, text, once, tmp_path):
  config = make_config(start, text, num_steps=1, new_weights_rate=0.25)
  train.train(config, tmp_path / "0.25")
  before, moved = load_model(start).params, {}
  for rate, workdir in ((1.0, once), (0.25, tmp_path / "0.25")):
    moved[rate] = jax.tree.map(np.subtract, load_model(workdir / "checkpoint").params, before)

  def check(path, whole, scaled):
    assert np.any(whole)
    new = any(key.key.startswith("feature_map") for key in path)
    # Differences of numbers of about 1 whose last bits are 1e-7.
    np.testing.assert_allclose(scaled, whole * (0.25 if new else 1.0), rtol=0, atol=5e-7 if new else 0)

  jax.tree_util.tree_map_with_path(check, moved[1.0], moved[0.25])
  with pytest.raises(ValueError, match=r"No parameter is left to train by the regex 'elsewhere'"):
    train.train(dataclasses.replace(config, new_weights="elsewhere", new_weights_rate=0.1), tmp_path / "none")
  with pytest.raises(ValueError, match=r"new_weights_rate=0: wanted a positive finite number"):
    make_config(start, text, new_weights_rate=0)


def test_frozen_parameters_have_no_moments_and_stay(start, text, tmp_path):
  config = make_config(start, text, num_steps=2, trainable="mlp|lm_head")
  train.train(config, tmp_path)
  changed = _changed(tmp_path, start)
  assert changed and all("mlp" in name or "lm_head" in name for name in changed)

  step = train_setup.make_train_step(config, load_model(start).config)
  shapes = step.state_shapes(make_mesh(devices=jax.devices()[:1]))
  trained = [
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params)
    if any(key.key in ("mlp", "lm_head") for key in path)
  ]
  moments = [leaf.size for leaf in jax.tree.leaves(shapes.opt_state) if leaf.ndim]
  assert sorted(moments) == sorted(trained * 2)  # Adam has two


def test_microbatches_are_the_same_step(start, text, tmp_path):
  # Kept apart, documents leave rows with unequal numbers of targets: the mean is over the batch, not of means.
  records = {}
  for parts in (1, 4):
    config = make_config(start, text, num_steps=3, microbatches=parts, data={"documents": "separate"})
    train.train(config, tmp_path / str(parts))
    records[parts] = [r for r in read_metrics(tmp_path / str(parts) / "metrics.jsonl") if "loss" in r]
  for got, want in zip(records[4], records[1], strict=True):
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6 if want["step"] == 1 else 1e-5)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-6 if want["step"] == 1 else 1e-4)


def test_prepared_sources_train_as_well(start, text, learned, tmp_path):
  flags = [f"--input={text}", f"--tokenizer={start}", f"--output={tmp_path / 'data'}", "--sequence_length=64"]
  done = programs.run("supra_jax.bin.prepare_data", *flags, "--heldout_every=6")
  assert done.returncode == 0, done.stderr
  prepared = {"input": "", "sources": f"{tmp_path / 'data/train'}:1", "heldout": str(tmp_path / "data/heldout")}
  train.train(make_config(start, text, data=prepared), tmp_path / "prepared")
  assert losses(tmp_path / "prepared") == losses(learned[0])
  assert not (tmp_path / "prepared" / "data").exists()


def test_overrides_and_errors_of_the_binary(start, text, tmp_path):
  recipe = runs.write_recipe(make_config(start, text, num_steps=2), tmp_path / "recipe.py")
  command = ["supra_jax.bin.train", f"--config={recipe}"]
  good = programs.run(*command, f"--workdir={tmp_path}/a", "--config.optimizer.learning_rate=0.25")
  assert good.returncode == 0 and "Held-out loss" in good.stdout, good.stderr
  assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["optimizer"]["learning_rate"] == 0.25
  (record,) = map(json.loads, (tmp_path / "a" / "runs.jsonl").read_text().splitlines())
  assert "--config.optimizer.learning_rate=0.25" in record["command"]

  cases = {
    "--config.optimizer.learnin_rate=1": "learnin_rate",  # no such key
    "--config.batch_size=many": "batch_size",  # wrong type
    "--config.data.input=" + str(tmp_path / "no*.txt"): "no*.txt",
  }
  for flag, named in cases.items():
    done = programs.run(*command, f"--workdir={tmp_path}/b", flag)
    assert done.returncode == 1 and named in done.stderr, (flag, done.stderr)


def test_another_config_in_the_same_workdir_is_refused(start, text, once, tmp_path):
  run = shutil.copytree(once, tmp_path / "run")
  before = (run / "metrics.jsonl").read_bytes()
  other = make_config(start, text, num_steps=1, optimizer={"learning_rate": 0.5}, seed=1)
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 before, 0.5 now; seed: 0 before, 1 now"):
    train.train(other, run)
  assert (run / "metrics.jsonl").read_bytes() == before
  # More steps: said how to go on, which goes on.
  with pytest.raises(ValueError, match=r"choose another workdir.*num_steps: 1 before, 2 now") as caught:
    train.train(make_config(start, text, num_steps=2), run)
  (further,) = re.findall(r"--config\.init_checkpoint=(\S+)\. ", str(caught.value))
  after = train.train(make_config(further, text, num_steps=2), tmp_path / "further").nll_before
  assert after == pytest.approx(read_metrics(run / "metrics.jsonl")[-1]["heldout_nll"], abs=1e-4)
  # What only says how often to look may change.
  train.train(make_config(start, text, num_steps=1, log_every=5), run)


def test_a_loss_that_is_not_finite_is_no_result(start, text, tmp_path):
  model = load_model(start)
  model.params["norm"]["weight"] = model.params["norm"]["weight"].at[0].set(np.inf)
  files = model.tokenizer_files
  save_model(tmp_path / "bad", config=model.config, params=model.params, tokenizer_files=files, source={})
  with pytest.raises(ValueError, match="the held-out loss is not finite"):
    train.train(make_config(tmp_path / "bad", text, num_steps=1), tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert '"heldout_nll": null' in lines and "NaN" not in lines


def test_a_run_of_before_an_option_goes_on(start, text, once, tmp_path):
  run = shutil.copytree(once, tmp_path / "run")
  path = run / CONFIG_FILE
  stored = json.loads(path.read_text())
  del stored["new_weights_rate"]
  path.write_text(json.dumps(stored))
  train.train(make_config(start, text, num_steps=1, save_every=1), run)
  with pytest.raises(ValueError, match=r"new_weights_rate: 1.0 before, 0.5 now"):
    train.train(make_config(start, text, num_steps=1, save_every=1, new_weights_rate=0.5), run)


def test_another_model_under_the_same_path_is_refused(start, text, once, tmp_path):
  run, model = shutil.copytree(once, tmp_path / "run"), shutil.copytree(start, tmp_path / "model")
  path = run / CONFIG_FILE
  path.write_text(path.read_text().replace(str(start), str(model)))  # as if it had started from there
  config = make_config(model, text, num_steps=1, save_every=1)
  train.train(config, run)
  stored = load_model(model).config
  (model / "config.json").write_text(stored.replace(norm_eps=1e-3).to_json())
  with pytest.raises(ValueError, match=r"model.norm_eps: 1e-0\d before, 0.001 now"):
    train.train(config, run)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
  return tiny.write_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher", "softmax", seed=1)


def test_distils_from_a_teacher(start, text, teacher, learned, tmp_path):
  """The model comes nearer to the teacher than it was, and than training alone brings it."""
  config = make_config(start, text, distill_from=str(teacher), distill_weight=1.0, microbatches=2)
  train.train(config, tmp_path / "run")
  tokens = np.stack([row["tokens"] for row in loading.heldout_batches(tmp_path / "run/data/heldout", batch_size=1)])[
    :, 0
  ]
  wanted = jax.nn.log_softmax(supra_jax.load(teacher)(tokens)[0])

  def divergence(directory):
    return float((np.exp(wanted) * (wanted - jax.nn.log_softmax(supra_jax.load(directory)(tokens)[0]))).sum(-1).mean())

  assert divergence(tmp_path / "run/checkpoint") < 0.8 * divergence(start)
  assert divergence(tmp_path / "run/checkpoint") < 0.8 * divergence(learned[0] / "checkpoint")


def test_transfers_attention_first_and_then_distils_streams(start, text, teacher, tmp_path):
  stages = {"distill_from": str(teacher), "transfer_steps": 6, "distill_weight": 0.5, "distill_hidden": 1.0}
  rate = {"learning_rate": 2e-3, "end_learning_rate": 2e-3}
  config = make_config(start, text, num_steps=6, microbatches=2, optimizer=rate, **stages)
  train.train(config, tmp_path / "first")
  attention = {name for name in _changed(tmp_path / "first", start) if re.search(config.transfer, name)}
  assert attention == _changed(tmp_path / "first", start) and "self_attn/q_proj/kernel" in attention
  records = read_metrics(tmp_path / "first/metrics.jsonl")
  assert sum("attention_error" in record for record in records) == 6 and not losses(tmp_path / "first")
  train.train(dataclasses.replace(config, num_steps=12), tmp_path / "then")
  assert {"embed_tokens/embedding", "mlp/up_proj/kernel"} | attention < _changed(tmp_path / "then", start)
  assert set(losses(tmp_path / "then")) == set(range(7, 13))

  tokens = np.stack([row["tokens"] for row in loading.heldout_batches(tmp_path / "then/data/heldout", batch_size=1)])[
    :, 0
  ]
  models = {
    name: supra_jax.load({"teacher": teacher, "start": start}.get(name, tmp_path / name / "checkpoint"))
    for name in ("teacher", "start", "first", "then")
  }
  module = {name: Transformer(lm.config, stacked=True) for name, lm in models.items()}
  params = {name: stack_layers(lm.params, lm.config) for name, lm in models.items()}
  ours, theirs = module["start"], module["teacher"]

  @jax.jit
  def errors(params, their_params):
    attention = layer_losses.attention_error(ours, params, theirs, their_params, tokens)
    streams = [layer_losses.read_streams(*model, tokens, None)[1] for model in ((ours, params), (theirs, their_params))]
    return attention.mean(), layer_losses.streams_error(ours, streams[0], theirs, streams[1]).mean()

  found = {name: errors(params[name], params["teacher"]) for name in ("start", "first", "then")}
  assert found["first"][0] < 0.98 * found["start"][0]
  assert found["then"][1] < 0.9 * found["start"][1]


def test_lolcats_transfers_to_feature_maps_and_then_trains_adapters(text, teacher, tmp_path):
  linearize_checkpoint(teacher, tmp_path / "start", Lolcats(window=4))
  stages = {"distill_from": str(teacher), "distill_weight": 0.0, "transfer_steps": 3}
  told = {"adapters": AdapterConfig(rank=2), "transfer": new_parameters(["lolcats"])}
  config = make_config(tmp_path / "start", text, num_steps=3, **stages, **told)
  train.train(config, tmp_path / "run")
  maps = {"self_attn/hedgehog_q/kernel", "self_attn/hedgehog_k/kernel", "self_attn/window_factor/weight"}
  assert _changed(tmp_path / "run", tmp_path / "start") == maps
  assert not losses(tmp_path / "run")
  train.train(dataclasses.replace(config, num_steps=6), tmp_path / "then")
  projections = {f"self_attn/{name}_proj/kernel" for name in "qkvo"}
  assert _changed(tmp_path / "then", tmp_path / "start") == maps | projections
  assert set(losses(tmp_path / "then")) == {4, 5, 6}


@pytest.mark.compat
def test_adapters_train_alone_and_are_merged_in_the_end(start, text, tmp_path):
  """With what is new; a run of them goes on as any other."""
  adapters = AdapterConfig(rank=2, kernels="self_attn/[qo]_proj/|mlp/up_proj/")
  config = make_config(start, text, num_steps=6, save_every=3, adapters=adapters, new_weights="feature_map")
  summary = train.train(config, tmp_path / "run")
  phi = {f"self_attn/{name}/{part}" for name in ("feature_map", "feature_map_kv") for part in ("kernel", "bias")}
  kernels = {"self_attn/q_proj/kernel", "self_attn/o_proj/kernel", "mlp/up_proj/kernel"}
  assert _changed(tmp_path / "run", start) == phi | kernels
  lm = supra_jax.load(tmp_path / "run/checkpoint")
  nll = train_setup.heldout_nll(lm.model, lm.params, tmp_path / "run/data/heldout", batch_size=4, max_rows=8)
  assert nll == pytest.approx(summary.nll_after, abs=1e-5) and nll < summary.nll_before
  # No moments but theirs.
  step = train_setup.make_train_step(config, lm.config)
  moments = step.state_shapes(make_mesh(devices=jax.devices()[:1])).opt_state
  names = {path[-2].key + "/" + path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(moments) if x.ndim}
  assert {name.split("/")[1] for name in names if "feature_map" not in name} == {"lora_a", "lora_b"}

  shutil.rmtree(tmp_path / "run/training/6")
  shutil.rmtree(tmp_path / "run/checkpoint")
  assert train.train(config, tmp_path / "run").nll_after == summary.nll_after
