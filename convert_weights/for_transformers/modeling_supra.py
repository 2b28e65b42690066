"""SUPRA (arXiv 2405.06640) in plain torch: parallel over the tokens of a text, and an RNN when it generates.

  model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

supra_jax wrote this file and the other *_supra.py next to the weights. They need only torch and transformers. A layer
has SUPRA's linear attention, whose cache is one matrix per head; or linear attention and a window of softmax attention,
whose cache is this matrix and the keys and values of the window and of the text's first tokens; or softmax attention
over a bounded memory, whose cache is the keys and values of a fixed number of tokens; or LoLCATs' attention, whose
cache is a matrix per head and a window; or T2R's or the linear transformer's, whose cache is a matrix and a vector per
head; or softmax attention, whose cache is all keys and values.

Shape suffixes: B batch, T tokens, S slots of a cache, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .attention_supra import (
  PADDING,
  DenseFeatureMap,
  PerHeadFeatureMap,
  SupraAttention,
  SupraNorm,
  Tokens,
  at_least_float32,
  head_slopes,
  rope_table,
  sights,
)
from .configuration_supra import SupraConfig
from .lolcats_supra import WEIGHT, Hedgehog, SupraLolcats, WindowFactor
from .memory_supra import SupraMemory, reaches
from .normalised_supra import SupraNormalised

logger = logging.get_logger(__name__)
# mixer -> class, where it has one of its own
ATTENTION = {
  "memory": SupraMemory,
  "lolcats": SupraLolcats,
  "t2r": SupraNormalised,
  "linear_transformer": SupraNormalised,
}
# Name of the cache in the outputs, which differs between releases of transformers.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class SupraCache(Cache):
  """Everything that the model remembers of the tokens it has read.

  Attributes:
    columns: number of tokens read in each row, padding included.
    seen_B: int64, number of real tokens read in each row; not set before the first call.
    slots: mixer -> positions of the keys that layers with this mixer remember, int64 [B, S].
    tensors: index of a layer -> what the layer remembers, as `SupraAttention.forward` returns it.
  """

  is_croppable = False  # the last tokens cannot be removed from a recurrent state
  seen_B: Tensor

  def __init__(self) -> None:
    super().__init__(layers=[])
    self.reset()

  def reset(self) -> None:
    self.columns = 0
    self.slots: dict[str, Tensor] = {}
    self.tensors: dict[int, tuple[Tensor, ...]] = {}

  @property
  def is_linear(self) -> list[bool]:
    """[False], by which `generate` knows that `get_seq_length` is reliable."""
    return [False]

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.columns

  def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
    if self.columns:
      self.seen_B = change(self.seen_B)
      self.slots = {mixer: change(x) for mixer, x in self.slots.items()}
      self.tensors = {layer: tuple(change(x) for x in held) for layer, held in self.tensors.items()}

  def reorder_cache(self, beam_idx: Tensor) -> None:
    self.batch_select_indices(beam_idx)

  def batch_select_indices(self, indices: Tensor) -> None:
    self._for_each(lambda x: x[indices.to(x.device)])

  def batch_repeat_interleave(self, repeats: int) -> None:
    self._for_each(lambda x: x.repeat_interleave(repeats, 0))

  def crop(self, *args: Any) -> None:
    raise ValueError("A recurrent state cannot be cropped.")


class SupraMLP(nn.Module):
  """`down(silu(gate x) * up x)`."""

  def __init__(self, config: SupraConfig):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

  def forward(self, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SupraBlock(GradientCheckpointingLayer):
  """`x + attention(norm x)`, then `x + MLP(norm x)`.

  No input is changed in place, so that gradient checkpointing can rerun the block.
  """

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__()
    self.input_layernorm = SupraNorm(config, config.hidden_size)
    self.self_attn = ATTENTION.get(config.mixers[layer], SupraAttention)(config, layer)
    self.post_attention_layernorm = SupraNorm(config, config.hidden_size)
    self.mlp = SupraMLP(config)

  def forward(self, x: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    mixed, held = self.self_attn(self.input_layernorm(x), tokens, held)
    x = x + mixed
    return x + self.mlp(self.post_attention_layernorm(x)), held


class SupraPreTrainedModel(PreTrainedModel):
  """Initialisation of new weights, and the features of transformers that the model supports."""

  config_class = SupraConfig
  base_model_prefix = "model"
  _no_split_modules: ClassVar[list[str]] = ["SupraBlock"]
  _supports_sdpa = True
  _is_stateful = True
  supports_gradient_checkpointing = True

  def get_input_embeddings(self) -> nn.Module:
    return self.base_model.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.base_model.embed_tokens = value

  def _init_weights(self, module: nn.Module) -> None:
    super()._init_weights(module)
    if isinstance(module, DenseFeatureMap | PerHeadFeatureMap | Hedgehog):
      for parameter in module.parameters():
        nn.init.uniform_(parameter, -(module.weight.shape[-1] ** -0.5), module.weight.shape[-1] ** -0.5)
    elif isinstance(module, WindowFactor):
      nn.init.constant_(module.weight, WEIGHT)


class SupraModel(SupraPreTrainedModel):
  """The model without the unembedding: token ids -> hidden states after the last norm."""

  def __init__(self, config: SupraConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.post_embed_norm = SupraNorm(config, config.hidden_size) if config.post_embed_norm else nn.Identity()
    self.layers = nn.ModuleList(SupraBlock(config, layer) for layer in range(len(config.mixers)))
    self.norm = SupraNorm(config, config.hidden_size)
    self.post_init()

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: SupraCache | None = None,
    past_key_values: SupraCache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    position_ids: Tensor | None = None,
  ) -> BaseModelOutputWithPast:
    """Reads tokens that follow those in the cache.

    Args:
      input_ids: token ids, int64 [B, T].
      attention_mask: 0 for padding, which may be on either side or in between; [B, T] for these tokens, or
        [B, tokens read before + T] for all.
      cache: SupraCache that an earlier call returned, updated in place; None: no earlier tokens. `past_key_values` is
        the older name of this argument.
      inputs_embeds: embeddings [B, T, D] to use instead of `input_ids`.
      use_cache: whether to make and return a cache if none is given; None: no.
      output_hidden_states: whether to return the embeddings and the output of each layer, [B, T, D] each.
      position_ids: positions [B, T] or [1, T]. They are only checked: positions follow from attention_mask and cache.

    Returns:
      The hidden states [B, T, D] after the last norm, and the cache.

    Raises:
      ValueError: the cache is not a SupraCache, or shapes or positions do not fit.
    """
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    x = self.post_embed_norm(x)
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, SupraCache):
      raise ValueError(
        f"The cache is a {type(cache).__name__}, which cannot hold this model's recurrent state. Pass none with the "
        "first tokens (generate makes its own), then the SupraCache that the model returns with use_cache=True."
      )
    if use_cache and self.training and torch.is_grad_enabled() and any(b.gradient_checkpointing for b in self.layers):
      logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.")
      use_cache = False
    if cache is None and use_cache:
      cache = SupraCache()
    tokens = self._place(x, attention_mask, cache)
    if position_ids is not None:
      self._check_positions(position_ids, tokens)
    seen = [x]
    for layer, block in enumerate(self.layers):
      x, held = block(x, tokens, None if cache is None else cache.tensors.get(layer))
      if cache is not None:
        cache.tensors[layer] = held
      seen.append(x)
    if cache is not None:
      self._forget(cache)
    return BaseModelOutputWithPast(
      last_hidden_state=self.norm(x), hidden_states=tuple(seen) if output_hidden_states else None, **{CACHE_NAME: cache}
    )

  def _place(self, x_BTD: Tensor, attention_mask: Tensor | None, cache: SupraCache | None) -> Tokens:
    """Returns the positions of the tokens of this call, and adds them to the cache."""
    batch, time = x_BTD.shape[:2]
    read = 0 if cache is None else cache.columns
    if attention_mask is not None and attention_mask.shape not in ((batch, time), (batch, read + time)):
      raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: wanted {(batch, read + time)}.")
    if attention_mask is None:
      real = torch.ones(batch, time, dtype=torch.bool, device=x_BTD.device)
    else:
      real = attention_mask[:, -time:].to(x_BTD.device, torch.bool)
    seen = real.new_zeros(batch, dtype=torch.int64) if cache is None or not cache.columns else cache.seen_B
    count = seen[:, None] + real.cumsum(1)
    position = (count - 1).clamp(min=0)
    slot = position.masked_fill(~real, PADDING)
    held = {} if cache is None else cache.slots
    slots = {mixer: torch.cat([held[mixer], slot], 1) if mixer in held else slot for mixer in sights(self.config)}
    if cache is not None:
      cache.columns, cache.seen_B, cache.slots = read + time, count[:, -1], slots
    slopes = torch.tensor(
      head_slopes(self.config.num_heads, self.config.supra), dtype=torch.float32, device=x_BTD.device
    )
    rope, rotation, far = self.config.rope, None, {}
    if rope["kind"] in ("half", "interleaved"):
      rotation = rope_table(rope, self.config.head_dim, position[..., None])
      far = {
        reach: rope_table(rope, self.config.head_dim, position.clamp(max=reach)[..., None])
        for reach, length in reaches(self.config).items()
        if read + time > length
      }
    begins = read == 0 and attention_mask is None
    return Tokens(real, position, slots, rotation, far, slopes, begins, seen, self._choices(real, position))

  def _choices(self, real_BT: Tensor, position_BT: Tensor) -> set[int]:
    """Returns the sizes of the chunks of memories of which one ends in this call, in some row."""
    chunks = {memory["chunk"] for memory in filter(None, self.config.memories or ())}
    if real_BT.shape[1] > 1 or torch.compiler.is_compiling():  # compiled code cannot depend on data
      return chunks
    return {chunk for chunk in chunks if bool((real_BT & ((position_BT + 1) % chunk == 0)).any())}

  def _check_positions(self, position_ids: Tensor, tokens: Tokens) -> None:
    """Raises ValueError unless `position_ids` equals `tokens.position_BT` at all real tokens."""
    wanted = tokens.position_BT
    if position_ids.shape not in (wanted.shape, wanted[:1].shape) or bool(
      (tokens.real_BT & (position_ids.to(wanted.device) != wanted)).any()
    ):
      raise ValueError(
        "position_ids: positions follow from attention_mask and the cache; wanted those, or none. Texts that are "
        "packed into one row cannot be told apart: give each a row of its own, padded."
      )

  def _forget(self, cache: SupraCache) -> None:
    """Drops the slots that no later token can see in any row."""
    for mixer, sight in sights(self.config).items():
      if sight.window is None:
        continue
      kept = sight.slots(cache.slots[mixer], cache.seen_B)
      cache.slots[mixer] = cache.slots[mixer][:, kept]
      for layer, held in cache.tensors.items():
        if self.config.mixers[layer] == mixer:
          cache.tensors[layer] = (*held[:-2], *(x[:, :, kept] for x in held[-2:]))


class SupraForCausalLM(SupraPreTrainedModel, GenerationMixin):
  """The language model: token ids -> logits. Within `generate`, a SupraCache carries its state from token to token."""

  def __init__(self, config: SupraConfig):
    super().__init__(config)
    self.model = SupraModel(config)
    # With tied embeddings there is no unembedding: `forward` uses the embedding.
    self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @classmethod
  def _supports_default_dynamic_cache(cls) -> bool:
    return False

  def get_output_embeddings(self) -> nn.Module:
    return self.get_input_embeddings() if self.lm_head is None else self.lm_head

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: SupraCache | None = None,
    past_key_values: SupraCache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **kwargs: Any,
  ) -> CausalLMOutputWithPast:
    """Computes logits, and the loss if labels are given. Arguments not listed are those of `SupraModel.forward`.

    Args:
      labels: token ids, int64 [B, T], -100 where no loss is taken; transformers' loss function shifts them.
      logits_to_keep: N, to compute logits for the last N tokens only (0: for all), or an int64 tensor of token indices.
      return_dict: False returns a tuple in place of the output object.
      **kwargs: position_ids, and arguments of the loss function.

    Returns:
      The logits, at least float32, [B, kept tokens, vocabulary], with loss, hidden states and cache.

    Raises:
      ValueError: as `SupraModel.forward`.
    """
    read = self.model(
      input_ids,
      attention_mask,
      cache,
      past_key_values,
      inputs_embeds,
      use_cache,
      output_hidden_states,
      kwargs.pop("position_ids", None),  # no named argument, because `generate` would then pass it
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    y = read.last_hidden_state[:, kept]
    logits = at_least_float32(F.linear(y, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(y))
    loss = None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
    output = CausalLMOutputWithPast(
      loss=loss,
      logits=logits,
      hidden_states=read.hidden_states,
      **{CACHE_NAME: getattr(read, CACHE_NAME)},
    )
    return output.to_tuple() if return_dict is False else output
