"""A transformer whose weights are set by hand so that it copies: after a token, the one that followed it before.

Layer 0 writes each token's predecessor into the stream (RoPE's fast pairs tell it from all others). Layer 1 looks for
the tokens whose predecessor is the current token, and predicts them: an induction head (Olsson et al. 2022). A window
of N tokens in both layers sees exactly N tokens back, and so copies at a distance of up to N, and of no more.
"""

import functools

import jax
import numpy as np

from supra_jax.inference.lm import LM
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Window
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.registry import layers
from supra_jax.model.shapes import parameter_shapes
from supra_jax.model.transformer import Transformer

VOCAB, HEAD = 48, 64
LETTERS, FILLED = np.arange(32), np.arange(32, VOCAB)  # tokens of strings, and of filler
FAST = 5  # pairs of features that tell positions: their angles are 1, 0.1, ... a token, and those of pairs 6 on 1e-6
CONFIG = ModelConfig(
  vocab_size=VOCAB,
  hidden_size=3 * VOCAB,  # a token, its predecessor, the prediction
  intermediate_size=8,
  num_heads=1,
  num_kv_heads=1,
  head_dim=HEAD,
  value_head_dim=VOCAB,
  layers=layers(("softmax", "softmax")),
  rope=RopeConfig(base=1e32),
  qkv_bias=True,
)


@functools.cache
def teacher() -> LM:
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), parameter_shapes(Transformer(CONFIG)))
  token, before, said = (slice(i * VOCAB, (i + 1) * VOCAB) for i in range(3))
  one = np.eye(VOCAB, dtype=np.float32)
  for name in ("layers_0", "layers_1"):
    for norm in ("input_layernorm", "post_attention_layernorm"):
      params[name][norm]["weight"][:] = 1
  params["norm"]["weight"][:] = 1
  params["embed_tokens"]["embedding"][:, token] = one
  params["lm_head"]["kernel"][said] = 3 * one

  previous = params["layers_0"]["self_attn"]
  angle = 10.0 ** -np.arange(FAST)
  previous["q_proj"]["bias"][:FAST] = 400
  previous["k_proj"]["bias"][:FAST] = np.cos(angle)
  previous["k_proj"]["bias"][HEAD // 2 :][:FAST] = np.sin(angle)
  previous["v_proj"]["kernel"][token] = one
  previous["o_proj"]["kernel"][:, before] = one / np.sqrt(3 * VOCAB)  # what the norm multiplied a single 1 by

  slow = np.concatenate([np.arange(6, HEAD // 2), np.arange(HEAD // 2 + 6, HEAD)])[:VOCAB]
  match = params["layers_1"]["self_attn"]
  match["q_proj"]["kernel"][token, slow] = 3 * one
  match["k_proj"]["kernel"][before, slow] = one
  match["v_proj"]["kernel"][token] = one
  match["o_proj"]["kernel"][:, said] = one / np.sqrt(3 * VOCAB / 2)
  return LM(CONFIG, params)


@functools.cache
def student(window: int) -> LM:
  """The model that copies within `window` tokens: its linear attention is there, and not read."""
  made = linearize(teacher().params, CONFIG, Window(window=window, sinks=0))
  return LM(made.config, made.params)


@functools.cache
def filler() -> np.ndarray:
  """Tokens of FILLED in which no three tokens in a row come twice (a de Bruijn sequence)."""
  seen, tokens = set(), [0, 0, 0]
  while len(tokens) < 16**3:
    following = next((x for x in range(15, -1, -1) if (*tokens[-2:], x) not in seen), None)
    if following is None:
      break
    tokens.append(following)
    seen.add(tuple(tokens[-3:]))
  return FILLED[np.array(tokens[3:])]
