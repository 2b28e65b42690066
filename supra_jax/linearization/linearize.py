"""Replaces the mixers of a trained softmax model; parameters that both mixers have are kept, others are initialised."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from supra_jax.core.files import check_free
from supra_jax.core.sharding import check_heads, least_tokens, make_mesh, process_shard
from supra_jax.data.loading import Batch
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.linearization.budget import remembered, within
from supra_jax.linearization.calibrate import Report, calibrate
from supra_jax.linearization.calibration_text import read_batches
from supra_jax.linearization.hybrid import choose_softmax_layers, layer_divergences, set_apart
from supra_jax.linearization.starts import STARTS, Calibrated, Identity, Memory, Reading, Start
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.supra import LinearConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.registry import layer as make_layer
from supra_jax.model.shapes import check_fit
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model

Params = Mapping[str, Any]
_TRAINED = "softmax"  # the mixer whose layers can be taken over


@dataclasses.dataclass(frozen=True)
class Linearized:
  """A linearised model.

  Attributes:
    params: parameters, one subtree per layer; new parameters have the dtype of the layer's q_proj.
    config: config of the linearised model.
    report: how the model was made, as JSON values for source.json: `start`; `mixer`; `layers`, the numbers of the
      layers whose mixer is new; with a `Reading` start, `calibrated_on`, the number of tokens that were read, which is
      less than `Reading.tokens` if the text is short; with `Memory`, what `remembered` found; and with `keep_softmax`,
      `kept_softmax`: the layers that stay softmax, and the `Divergences` that they were chosen by.
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
  rope_base: float | None = None,
  tokenizer: Tokenizer | None = None,
  mesh: Mesh | None = None,
  progress: Report | None = None,
) -> Linearized:
  """Replaces the mixer of softmax layers by another one (paper, section 3).

  Parameters that the model has before and after (projections and their norms, MLP, embeddings) are kept bit for bit;
  new parameters start as the mixer's `begin` makes them. With the start `Calibrated`, the output projections, and the
  last projections of the MLPs, are then solved for.

  Args:
    params: parameters of the softmax model, one subtree per layer.
    config: config of the softmax model.
    start: one of `linearization.starts`. None: `Memory()`, or `Identity()` if a mixer is given.
    mixer: config of the new layers, such as `registry.layer("supra_window", window=16)`, or a mixer's name; None: the
      start's default. `Window` takes a SupraConfig and adds the window.
    layers: numbers of the layers to replace, negative ones counted from the end; None means all softmax layers.
    rope_base: base of the RoPE of the linearised model; the paper takes 1e6 for long rows. None: the teacher's.
    tokenizer: tokenizer of the model, with which a `Reading` start reads text; not needed for packed rows.
    mesh: device mesh that a `Reading` start shards parameters and batches over; None: all devices on `fsdp`.
    progress: called after each layer that is calibrated or measured, see `calibrate`, `head_errors` and
      `layer_divergences`.

  Raises:
    FileNotFoundError: the text or a packed directory of a `Reading` start is missing.
    ValueError: `start` is not a Start; `rope_base` is given and softmax attention stays in the model; a layer does not
      exist or is not softmax; the mixer is unknown, cannot replace the mixer of a trained layer, or does not fit
      the start or the teacher; the size of a memory is too small; `keep_softmax` is not between 1 and the number of
      `layers` minus 1; the data of a `Reading` start do not suffice or do not fit the model; or activations are not
      finite.
  """
  start = _start(start, mixer)
  if not isinstance(start, Start):
    raise ValueError(f"start={start!r}: wanted one of {', '.join(f'{kind.__name__}()' for kind in STARTS.values())}.")
  chosen = _chosen_layers(config, layers)
  layer = start.layer(make_layer(mixer) if isinstance(mixer, str) else mixer)
  if isinstance(start, Memory):
    layer, _ = within(start, config, chosen)
  if mixer_class(layer.mixer).begin is None:
    raise ValueError(f"The mixer {layer.mixer!r} cannot take over a trained layer: it is for models from scratch.")
  if refusal := mixer_class(layer.mixer).refusal(config, layer):
    raise ValueError(refusal)
  if rope_base is not None:
    _check_rope_base(rope_base, config, layer, chosen, start)
  check_fit(config, params)
  report: dict[str, Any] = {"start": start.to_json(), "mixer": {"mixer": layer.mixer, **dataclasses.asdict(layer)}}
  more: dict[str, Any] = {}
  teacher = (params, config)
  based = functools.partial(_begun, rope_base=rope_base)
  if rope_base is not None:
    report["rope_base"] = rope_base
  if isinstance(start, Reading):
    mesh = make_mesh() if mesh is None else mesh
    check_heads(config.num_heads, config.num_kv_heads, mesh)
  if isinstance(start, Memory):
    assert mesh is not None
    with jax.set_mesh(mesh):
      batches = read_batches(start, tokenizer, config.vocab_size, mesh)
      new, new_config, more = remembered(teacher, start, batches, mesh, chosen, progress)
      more["calibrated_on"] = _tokens(batches, mesh)
  elif not isinstance(start, Calibrated):
    new, new_config = based(params, config, layer, start, chosen)
  else:
    assert mesh is not None
    with jax.set_mesh(mesh):
      calibrated = functools.partial(_calibrated, based, teacher, layer, start, mesh, progress)
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
      more["calibrated_on"] = _tokens(batches, mesh)
  return Linearized(new, new_config, {**report, "layers": chosen, **more})


def linearize_checkpoint(
  checkpoint: str | os.PathLike[str],
  output: str | os.PathLike[str],
  start: Start | None = None,
  *,
  mixer: MixerConfig | str | None = None,
  layers: Sequence[int] | None = None,
  rope_base: float | None = None,
  mesh: str = "",
  progress: Report | None = None,
) -> Linearized:
  """Loads a softmax model, linearises it with `linearize`, and writes the linearised model.

  Args:
    checkpoint: model directory of the softmax model.
    output: model directory to write; it must not exist, or be empty.
    start, mixer, layers, rope_base, progress: as in `linearize`.
    mesh: sizes of mesh axes, as `core.sharding.make_mesh` takes them; used by `Reading` starts only.

  Returns:
    The model that was written.

  Raises:
    FileExistsError: `output` is not empty.
    FileNotFoundError: `checkpoint` is not a model directory, or the data of a `Reading` start are missing.
    ValueError: as `linearize`; or the checkpoint is damaged, or `mesh` does not fit the devices.
  """
  check_free(output)
  start = _start(start, mixer)
  devices = make_mesh(mesh) if isinstance(start, Reading) else None
  shardings = None if devices is None else functools.partial(param_shardings, mesh=devices)
  teacher = load_model(checkpoint, shardings=shardings)
  try:
    tokenizer = Tokenizer.from_files(teacher.tokenizer_files, teacher.config)  # or a damaged one would be passed on
  except ValueError as error:
    raise ValueError(f"{checkpoint}: {error}") from error
  made = linearize(
    teacher.params,
    teacher.config,
    start,
    mixer=mixer,
    layers=layers,
    rope_base=rope_base,
    tokenizer=tokenizer,
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


def _start(start: Start | None, mixer: MixerConfig | str | None) -> Start:
  """Returns the start that was asked for, or the default."""
  if start is None:
    return Memory() if mixer is None else Identity()
  return start


def _calibrated(
  begun: Callable[..., tuple[dict[str, Any], ModelConfig]],
  teacher: tuple[Params, ModelConfig],
  layer: MixerConfig,
  start: Calibrated,
  mesh: Mesh,
  progress: Report | None,
  layers: Sequence[int],
  batches: Sequence[Batch],
) -> tuple[dict[str, Any], ModelConfig]:
  """Returns (parameters, config) of the calibrated student that has the new mixer in these layers."""
  params, config = begun(*teacher, layer, start, layers)
  params = jax.tree.map(_placed, params, param_shardings(params, mesh))
  how: dict[str, Any] = {"ridge": start.ridge, "mlp": start.mlp, "dtype": start.dtype}
  return calibrate(teacher, (params, config), batches, mesh, **how, report=progress), config


def _tokens(batches: Sequence[Batch], mesh: Mesh) -> int:
  """Returns the number of tokens of the batches of all processes."""
  return sum(batch["tokens"].size - len(batch["tokens"]) for batch in batches) * process_shard(mesh)[1]


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """Moves a parameter to `sharding` unless it is there; new parameters are on one device of each process."""
  return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(np.asarray(x), sharding)


def _chosen_layers(config: ModelConfig, layers: Sequence[int] | None) -> list[int]:
  count = config.num_layers
  if layers is not None and len(layers) == 0:
    raise ValueError("layers is empty: wanted numbers of layers, or None for all softmax layers.")
  wanted = [i for i, mixer in enumerate(config.mixers) if mixer == _TRAINED] if layers is None else list(layers)
  if not wanted:
    has = ", ".join(f"{count} of {name}" for name, count in collections.Counter(config.mixers).items())
    raise ValueError(f"No layer to linearise: its layers are {has}; wanted the transformer that it was made from.")
  for i in wanted:
    if not -count <= i < count:
      raise ValueError(f"Layer {i}: the model has layers 0 to {count - 1}.")
    if config.mixers[i] != _TRAINED:
      raise ValueError(f"Layer {i} is a {config.mixers[i]!r} layer; only softmax layers can be linearised.")
  return sorted({i % count for i in wanted})


def _begun(
  params: Params,
  config: ModelConfig,
  layer: MixerConfig,
  start: Start,
  chosen: Sequence[int],
  *,
  rope_base: float | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
  """Returns (parameters, config) of the model whose chosen layers have the new mixer, before any calibration.

  Running the Flax `init` of a one-layer model gives the mixer's parameters and draws those that are new.
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
  rope = config.rope if rope_base is None else dataclasses.replace(config.rope, base=rope_base)
  return begun, config.replace(layers=layers, rope=rope)


def _check_rope_base(base: float, config: ModelConfig, layer: MixerConfig, chosen: Sequence[int], start: Start) -> None:
  """Raises ValueError if softmax attention, which was trained with the teacher's base, stays in the model."""
  stays = len(chosen) < config.num_layers or getattr(start, "keep_softmax", None) is not None
  if stays or not isinstance(layer, LinearConfig) or isinstance(layer, WindowConfig):
    what = "some layers keep it" if stays else f"{layer.mixer} layers have it"
    raise ValueError(f"rope_base={base:g}: softmax attention wants the base that it was trained with, and {what}.")
