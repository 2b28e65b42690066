"""Layers of a trained softmax model get another mixer: what both mixers have is kept, and the rest begins as asked."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from supra_jax.core.files import check_free
from supra_jax.core.sharding import least_tokens, make_mesh, process_shard
from supra_jax.data.loading import Batch
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.linearization.calibrate import Report, calibrate
from supra_jax.linearization.calibration_text import read_batches
from supra_jax.linearization.hybrid import choose_softmax_layers, layer_divergences, set_apart
from supra_jax.linearization.starts import STARTS, Calibrated, Identity, Start, Window
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.registry import layer as make_layer
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model

Params = Mapping[str, Any]
_TRAINED = "softmax"  # the mixer whose layers can be taken over


@dataclasses.dataclass(frozen=True)
class Linearized:
  """A linearised model.

  Attributes:
    params: one subtree a layer; new parameters have the dtype of the layer's q_proj.
    config: of the new model.
    report: plain values that say how the model was made, for source.json: `start`, `mixer`, `layers` (those whose mixer
      is new); `calibrated_on`, the number of tokens that calibration read, fewer than it wanted if the text is short;
      and, where layers were measured, `kept_softmax`.
  """

  params: dict[str, Any]
  config: ModelConfig
  report: dict[str, Any]


def linearize(
  params: Params,
  config: ModelConfig,
  start: Start | None = None,
  *,
  mixer: MixerConfig | str | None = None,
  layers: Sequence[int] | None = None,
  tokenizer: Tokenizer | None = None,
  mesh: Mesh | None = None,
  progress: Report | None = None,
) -> Linearized:
  """Turns softmax layers into layers of another mixer (paper, section 3).

  Parameters that both mixers have (projections and their norms, MLP, embeddings) are kept bit for bit; new ones begin
  as the mixer's `begin` says. Calibration then solves for the output projections.

  Args:
    params: of the softmax model, one subtree a layer.
    config: of the softmax model.
    start: one of `linearization.starts`. None: `Window()`, or `Identity()` if a mixer is given.
    mixer: config of the new layers, `registry.layer("supra_window", window=16)` say, or a mixer's name; None: the
      start's default. `Window` takes a SupraConfig, to which it adds the window.
    layers: which layers, negative ones counted from the end; None means all softmax layers.
    tokenizer: reads the text of `Calibrated`; not needed for packed rows.
    mesh: over which parameters and batches are cut while `Calibrated` computes; None: all devices on `fsdp`.
    progress: as `calibrate` and `layer_divergences` take it.

  Raises:
    ValueError: a layer is named that does not exist or is no softmax layer, the mixer cannot take over a trained layer
      or does not fit the start or the teacher, or the text of `Calibrated` does not suffice.
  """
  if start is None:
    start = Window() if mixer is None else Identity()
  if not isinstance(start, Start):
    raise ValueError(f"start={start!r}: wanted one of {', '.join(f'{kind.__name__}()' for kind in STARTS.values())}.")
  chosen = _chosen_layers(config, layers)
  layer = start.layer(make_layer(mixer) if isinstance(mixer, str) else mixer)
  if mixer_class(layer.mixer).begin is None:
    raise ValueError(f"The mixer {layer.mixer!r} cannot take over a trained layer: it is for models from scratch.")
  if refusal := mixer_class(layer.mixer).refusal(config, layer):
    raise ValueError(refusal)
  report = {"start": start.to_json(), "mixer": {"mixer": layer.mixer, **dataclasses.asdict(layer)}}
  more: dict[str, Any] = {}
  if not isinstance(start, Calibrated):
    new, new_config = _begun(params, config, layer, start, chosen)
  else:
    mesh = make_mesh() if mesh is None else mesh
    with jax.set_mesh(mesh):
      teacher = (params, config)
      calibrated = functools.partial(_calibrated, teacher, layer, start, mesh, progress)
      if start.keep_softmax is None:
        batches = read_batches(start, tokenizer, config.vocab_size, mesh)
        new, new_config = calibrated(chosen, batches)
      else:
        if not 0 < start.keep_softmax < len(chosen):
          wanted = f"1 to {len(chosen) - 1}" if len(chosen) > 1 else "more layers to choose from"
          raise ValueError(f"keep_softmax={start.keep_softmax} of {len(chosen)} layers: wanted {wanted}.")
        batches = read_batches(start, tokenizer, config.vocab_size, mesh, more=start.measured_tokens)
        batches, fresh = set_apart(batches, start.measured_tokens, mesh)
        first = calibrated(chosen, batches)
        measured = layer_divergences(teacher, first, fresh, mesh, dtype=start.dtype, report=progress)
        stay = choose_softmax_layers(measured, start.keep_softmax)
        more = {"kept_softmax": {"layers": stay, **measured._asdict()}}
        chosen = [i for i in chosen if i not in stay]
        new, new_config = calibrated(chosen, batches)
      own = sum(batch["tokens"].size - len(batch["tokens"]) for batch in batches)
      more["calibrated_on"] = own * process_shard(mesh)[1]
  return Linearized(new, new_config, {**report, "layers": chosen, **more})


def linearize_checkpoint(
  checkpoint: str | os.PathLike[str],
  output: str | os.PathLike[str],
  start: Start | None = None,
  *,
  mixer: MixerConfig | str | None = None,
  layers: Sequence[int] | None = None,
  mesh: str = "",
  progress: Report | None = None,
) -> Linearized:
  """`linearize` from model directory to model directory.

  Args:
    checkpoint: of the softmax model.
    output: must not exist yet, or be empty.
    start, mixer, layers, progress: as `linearize` takes them.
    mesh: as `core.sharding.make_mesh` takes it; for `Calibrated`.

  Raises:
    FileExistsError: `output` holds something.
    ValueError: as `linearize`.
  """
  check_free(output)
  calibrates = isinstance(start, Calibrated)
  devices = make_mesh(mesh) if calibrates else None
  shardings = None if devices is None else functools.partial(param_shardings, mesh=devices)
  teacher = load_model(checkpoint, shardings=shardings)
  made = linearize(
    teacher.params,
    teacher.config,
    start,
    mixer=mixer,
    layers=layers,
    tokenizer=Tokenizer.from_files(teacher.tokenizer_files, teacher.config) if calibrates else None,
    mesh=devices,
    progress=progress,
  )
  save_model(
    output,
    config=made.config,
    params=made.params,
    tokenizer_files=teacher.tokenizer_files,
    source={"linearized_from": teacher.source, **made.report},
  )
  return made


def _calibrated(
  teacher: tuple[Params, ModelConfig],
  layer: MixerConfig,
  start: Calibrated,
  mesh: Mesh,
  progress: Report | None,
  layers: Sequence[int],
  batches: Sequence[Batch],
) -> tuple[dict[str, Any], ModelConfig]:
  """The student that has the new mixer in these layers, calibrated."""
  params, config = _begun(*teacher, layer, start, layers)
  params = jax.tree.map(_placed, params, param_shardings(params, mesh))
  how: dict[str, Any] = {"ridge": start.ridge, "mlp": start.mlp, "dtype": start.dtype}
  return calibrate(teacher, (params, config), batches, mesh, **how, report=progress), config


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """A parameter where the mesh has it; new ones are on one device of each process."""
  return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(np.asarray(x), sharding)


def _chosen_layers(config: ModelConfig, layers: Sequence[int] | None) -> list[int]:
  count = config.num_layers
  wanted = [i for i, mixer in enumerate(config.mixers) if mixer == _TRAINED] if layers is None else list(layers)
  if not wanted:
    raise ValueError(f"No layer to linearise: mixers are {config.mixers}.")
  for i in wanted:
    if not -count <= i < count:
      raise ValueError(f"Layer {i}: the model has layers 0 to {count - 1}.")
    if config.mixers[i] != _TRAINED:
      raise ValueError(f"Layer {i} is a {config.mixers[i]!r} layer; only softmax layers can be linearised.")
  return sorted({i % count for i in wanted})


def _begun(
  params: Params, config: ModelConfig, layer: MixerConfig, start: Start, chosen: Sequence[int]
) -> tuple[dict[str, Any], ModelConfig]:
  """The model whose chosen layers have the new mixer, before any calibration.

  The model's own initialiser, run for one layer, says which parameters the mixer has and draws those that are new.
  """
  begin = mixer_class(layer.mixer).begin
  one_layer = Transformer(config.replace(layers=(layer,)))
  old = params[f"layers_{chosen[0]}"][MIXER]
  tokens = least_tokens()
  shapes = jax.eval_shape(lambda: one_layer.init(jax.random.key(0), tokens))["params"]["layers_0"][MIXER]
  kept = [name for name in shapes if name in old]
  for name in kept:
    for part, shape in shapes[name].items():
      if part in old[name] and old[name][part].shape != shape.shape:
        raise ValueError(
          f"{name}/{part} of the mixer {layer.mixer!r} has shape {shape.shape}, of the teacher {old[name][part].shape}."
        )

  @jax.jit
  def draw(key):
    attention = one_layer.init(key, tokens)["params"]["layers_0"][MIXER]
    return begin({name: tree for name, tree in attention.items() if name not in kept}, start)

  seed = getattr(start, "seed", 0)
  begun = dict(params)
  for i in chosen:
    attention = params[f"layers_{i}"][MIXER]
    dtype = attention["q_proj"]["kernel"].dtype
    new = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), draw(jax.random.fold_in(jax.random.key(seed), i)))
    begun[f"layers_{i}"] = {**params[f"layers_{i}"], MIXER: {name: attention[name] for name in kept} | new}
  layers = tuple(layer if i in chosen else other for i, other in enumerate(config.layers))
  return begun, config.replace(layers=layers)
