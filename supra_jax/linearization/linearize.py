"""Softmax parameters -> SUPRA parameters: everything is kept, phi is new."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from supra_jax.core.files import check_free, place
from supra_jax.core.sharding import batch_shards, least_tokens, make_mesh, process_shard
from supra_jax.data.loading import Batch, make_loader, parse_sources
from supra_jax.data.packed import META_FILE, check_packed
from supra_jax.data.text import documents_in_turns
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.linearization.calibrate import Report, calibrate
from supra_jax.linearization.hybrid import MEASURED_TOKENS, choose_softmax_layers, layer_divergences, set_apart
from supra_jax.linearization.solve import RIDGE
from supra_jax.model.config import Mixer, ModelConfig, SupraConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import ModelCheckpoint, load_model, save_model

Phi = Literal["random", "identity"]
# Of a text's first tokens; one does nearly as well, see BUILD_NOTES.md.
SINKS = 4


def linearize(
  params: Mapping[str, Any],
  config: ModelConfig,
  *,
  supra: SupraConfig | None = None,
  layers: Sequence[int] | None = None,
  phi: Phi = "random",
  seed: int = 0,
  window: int | None = None,
  sinks: int = SINKS,
) -> tuple[dict[str, Any], ModelConfig]:
  """Turns softmax layers into SUPRA layers (paper, section 3).

  What both mixers have (projections and their norms, MLP, embeddings) is kept as it is, bit for bit. What only `supra`
  has is new: gains of its own qk-norm are 1; phi is drawn as the reference draws it, weight and bias from
  U(-1/sqrt(fan_in), 1/sqrt(fan_in)), or else W is the identity and b is 0. With a window the linear attention's own
  output projection is 0, whatever phi is: the layer begins as the teacher's, its softmax cut to the window and the
  sinks. Its gradient is not 0, and with its first step phi's is not either.

  Args:
    params: of the softmax model, one subtree a layer.
    config: of the softmax model.
    supra: phi, decay and qk-norm; None means the paper's.
    layers: which layers, negative ones counted from the end; None means all.
    phi: what it begins as, "random" or "identity".
    seed: of the random ones; a layer's draw depends on the seed and on its place alone.
    window: the layers become `supra_window`, whose softmax sees so many tokens; None: `supra`. It is here that the new
      config's window comes from, and not from `supra`.
    sinks: which sees as many of a text's first tokens as well; likewise.

  Returns:
    (params, config) of the new model. New parameters have the dtype of the layer's q_proj.

  Raises:
    ValueError: a layer is named that there is not, or that is no softmax layer; or the window would change that of
      layers that there are.
  """
  chosen = _chosen_layers(config, layers)
  mixer: Mixer = "supra" if window is None else "supra_window"
  supra = config.supra if supra is None else supra
  if window is not None and config.sliding_window is not None and window > config.sliding_window:
    raise ValueError(f"window={window}: the teacher's own softmax sees {config.sliding_window} tokens; wanted no more.")
  old = (config.supra.window, config.supra.sinks)
  seen = old if window is None else (window, sinks)
  if seen != old and "supra_window" in config.mixers:
    raise ValueError(f"window={window}, sinks={sinks}: the model has layers with window={old[0]}, sinks={old[1]}.")
  supra = dataclasses.replace(supra, window=seen[0], sinks=seen[1])
  mixers = tuple(mixer if i in chosen else old for i, old in enumerate(config.mixers))
  new_config = config.replace(mixers=mixers, supra=supra)
  return {name: tree for name, tree in params.items()} | _new_layers(params, new_config, chosen, phi, seed), new_config


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How `calibrate` is to solve for the output projections.

  Attributes:
    data: directories that `prepare_data` packed, with weights, as `data.parse_sources` reads them; or text, as
      `text.find_files` finds it, of which no more is read than it takes.
    text_key, sequence_length: of text.
    tokens: so many are read, rounded up to whole batches.
    batch_size: rows at a time; more where the mesh has more shards.
    ridge, mlp: as `calibrate` takes them.
    seed: of the order of packed rows.
    dtype: of the computation.
    mesh: as `sharding.make_mesh` takes it.
  """

  data: str
  text_key: str = "text"
  sequence_length: int = 512
  tokens: int = 32768
  batch_size: int = 8
  ridge: float = RIDGE
  mlp: bool = True
  seed: int = 0
  dtype: str = "float32"
  mesh: str = ""


def linearize_checkpoint(
  checkpoint: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  supra: SupraConfig | None = None,
  layers: Sequence[int] | None = None,
  phi: Phi = "random",
  seed: int = 0,
  window: int | None = None,
  sinks: int = SINKS,
  calibration: Calibration | None = None,
  keep_softmax: int | None = None,
  measured_tokens: int = MEASURED_TOKENS,
  report: Report | None = None,
) -> ModelConfig:
  """`linearize`, and where it is asked for `calibrate`, from model directory to model directory.

  With `keep_softmax` it does so twice: so many of the layers, chosen by what was measured on the first student, stay as
  they are in the second.

  Args:
    checkpoint: of the softmax model.
    output: must not exist yet, or be empty.
    supra, layers, phi, seed, window, sinks: as `linearize` takes them.
    calibration: None: the teacher's output projections stay.
    keep_softmax: how many of the layers stay softmax, those that bring the calibrated student nearest to its teacher.
    measured_tokens: so many more are read, to measure that on.
    report: as `calibrate` and `layer_divergences` take it.

  Returns:
    The new config.

  Raises:
    FileExistsError: `output` holds something.
    ValueError: as `linearize`; or so many layers cannot be kept; or they are to be chosen and nothing is calibrated.
  """
  check_free(output)
  new: dict[str, Any] = {"supra": supra, "layers": layers, "phi": phi, "seed": seed, "window": window, "sinks": sinks}
  kept: dict[str, Any] | None = None
  if calibration is None:
    if keep_softmax is not None:
      raise ValueError(f"keep_softmax={keep_softmax} layers are chosen by what calibration leaves: wanted one.")
    start = load_model(checkpoint)
    params, config = linearize(start.params, start.config, **new)
  else:
    mesh = make_mesh(calibration.mesh)
    with jax.set_mesh(mesh):
      start = load_model(checkpoint, shardings=lambda stored: param_shardings(stored, mesh))
      teacher = (start.params, start.config)
      calibrated = functools.partial(_calibrated, teacher, new, calibration, mesh, report)
      chosen = _chosen_layers(start.config, layers)
      if keep_softmax is None:
        params, config = calibrated(chosen, _first_batches(calibration, start, mesh))
      else:
        if not 0 < keep_softmax < len(chosen):
          raise ValueError(f"keep_softmax={keep_softmax} of {len(chosen)} layers: wanted 1 to {len(chosen) - 1}.")
        batches = _first_batches(calibration, start, mesh, more=measured_tokens)
        batches, fresh = set_apart(batches, measured_tokens, mesh)
        first = calibrated(chosen, batches)
        measured = layer_divergences(teacher, first, fresh, mesh, dtype=calibration.dtype, report=report)
        stay = choose_softmax_layers(measured, keep_softmax)
        kept = {"layers": stay, **measured._asdict()}
        params, config = calibrated([i for i in chosen if i not in stay], batches)
  made = new | {
    "supra": dataclasses.asdict(config.supra),
    "layers": None if layers is None else list(layers),
    "sinks": None if window is None else sinks,
    "calibration": None if calibration is None else dataclasses.asdict(calibration),
    "kept_softmax": kept,
  }
  save_model(
    output,
    config=config,
    params=params,
    tokenizer_files=start.tokenizer_files,
    source={"linearized_from": start.source, **made},
  )
  return config


def _calibrated(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  new: Mapping[str, Any],
  calibration: Calibration,
  mesh: Mesh,
  report: Report | None,
  layers: Sequence[int],
  batches: Sequence[Batch],
) -> tuple[dict[str, Any], ModelConfig]:
  """The student that these layers make, linearised and calibrated."""
  params, config = linearize(*teacher, **{**new, "layers": layers})
  params = jax.tree.map(_placed, params, param_shardings(params, mesh))
  how: dict[str, Any] = {"ridge": calibration.ridge, "mlp": calibration.mlp, "dtype": calibration.dtype}
  return calibrate(teacher, (params, config), batches, mesh, **how, report=report), config


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """A parameter where the mesh has it; new ones are on one device of each process."""
  return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(np.asarray(x), sharding)


def _first_batches(calibration: Calibration, start: ModelCheckpoint, mesh: Mesh, more: int = 0) -> list[Batch]:
  """As many whole batches as hold the tokens that were asked for, and more; this process' part of them."""

  def count_batches(tokens: int) -> int:
    return -(-calibration.tokens // tokens) - (-more // tokens)

  shards = batch_shards(mesh)
  rows = -(-calibration.batch_size // shards) * shards
  sources = parse_sources(calibration.data)
  tokenizer = Tokenizer.from_files(start.tokenizer_files, start.config)
  index, count = process_shard(mesh)
  if (place(sources[0][0]) / META_FILE).exists():
    for path, _ in sources:
      check_packed(path, vocab_size=start.config.vocab_size, tokenizer=tokenizer)
    loader = make_loader(sources, batch_size=rows, seed=calibration.seed, shard_index=index, shard_count=count)
    first = next(loader)
    length = first["tokens"].shape[1] - 1
    return [first, *itertools.islice(loader, count_batches(rows * length) - 1)]
  if tokenizer is None:
    raise ValueError(f"The model has no tokenizer to read {calibration.data} with.")
  wanted = count_batches(rows * calibration.sequence_length) * rows
  texts = rows_of_text(
    calibration.data, tokenizer, rows=wanted, length=calibration.sequence_length + 1, text_key=calibration.text_key
  )
  whole = len(texts) // rows * rows
  if not whole:
    raise ValueError(
      f"{calibration.data} has {len(texts)} rows of {calibration.sequence_length} tokens for calibration; wanted at "
      f"least {rows}. Give more text."
    )
  return [{"tokens": texts[at + index : at + rows : count]} for at in range(0, whole, rows)]


def rows_of_text(pattern: str, tokenizer: Tokenizer, *, rows: int, length: int, text_key: str = "text") -> np.ndarray:
  """Reads no more of some text than it takes to fill rows.

  Files take turns, and no document gives more than a row, so that rows differ; documents are joined by the end-of-text
  id.

  Args:
    pattern, text_key: as `text.find_files` and `text.read_documents` take them.
    tokenizer: that encodes.
    rows: at most so many.
    length: tokens of each.

  Returns:
    int32 [rows or fewer, length].
  """
  end = list(tokenizer.eos_ids[:1])
  ids: list[int] = []
  for text in documents_in_turns(pattern, text_key):
    # No tokenizer has 16 characters a token on average.
    ids += [*tokenizer.encode(text[: 16 * length], bos=False)[: length - 1], *end]
    if len(ids) >= rows * length:
      break
  found = min(len(ids) // length, rows)
  return np.asarray(ids[: found * length], np.int32).reshape(found, length)


def _chosen_layers(config: ModelConfig, layers: Sequence[int] | None) -> list[int]:
  count = config.num_layers
  wanted = [i for i, mixer in enumerate(config.mixers) if mixer == "softmax"] if layers is None else list(layers)
  if not wanted:
    raise ValueError(f"No layer to linearise: mixers are {config.mixers}.")
  for i in wanted:
    if not -count <= i < count:
      raise ValueError(f"Layer {i}: the model has layers 0 to {count - 1}.")
    if config.mixers[i] != "softmax":
      raise ValueError(f"Layer {i} is a {config.mixers[i]!r} layer; only softmax layers can be linearised.")
  return sorted({i % count for i in wanted})


def _new_layers(
  params: Mapping[str, Any], config: ModelConfig, chosen: Sequence[int], phi: Phi, seed: int
) -> dict[str, Any]:
  """The chosen layers, with `new` parameters added to the teacher's.

  The shapes of what is new come from the model's own initialiser, run for one layer with everything else left out.
  """
  one_layer = Transformer(config.replace(mixers=config.mixers[chosen[0] : chosen[0] + 1]))
  tokens = least_tokens()
  kept = params[f"layers_{chosen[0]}"]["self_attn"].keys()

  @jax.jit
  def draw(key):
    attention = one_layer.init(key, tokens)["params"]["layers_0"]["self_attn"]
    return {name: _begun(name, tree, phi) for name, tree in attention.items() if name not in kept}

  new_layers = {}
  for i in chosen:
    layer = params[f"layers_{i}"]
    dtype = layer["self_attn"]["q_proj"]["kernel"].dtype
    new = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), draw(jax.random.fold_in(jax.random.key(seed), i)))
    new_layers[f"layers_{i}"] = {**layer, "self_attn": {**layer["self_attn"], **new}}
  return new_layers


def _begun(name: str, drawn: Mapping[str, jax.Array], phi: Phi) -> Mapping[str, jax.Array]:
  """What a new part begins as: phi's W = I, of each head where there are several, and b = 0 where that is wanted."""
  if name == "linear_o_proj":
    return jax.tree.map(jnp.zeros_like, drawn)
  if phi == "random" or not name.startswith("feature_map"):
    return drawn
  kernel, bias = drawn["kernel"], drawn["bias"]
  return {"kernel": jnp.broadcast_to(jnp.eye(kernel.shape[-1]), kernel.shape), "bias": jnp.zeros_like(bias)}
