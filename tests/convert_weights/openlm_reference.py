"""OpenLM's forward pass once more, in numpy and float64, over its own config keys and tensor names."""

import math

import numpy as np


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every tensor of a model, norms first."""
  d, h, g, k, v = c["dim"], c["n_heads"], c["n_heads_kv"], c["qk_head_dim"], c["v_head_dim"]
  linear, f = c["attn_name"] == "linear_attn", c["intermediate_dim_ffn"]
  norms = {"norm": d} | ({"post_embed_norm": d} if c.get("post_embed_norm") else {})
  result = {"tok_embeddings.weight": (c["vocab_size"], d), "output.weight": (c["vocab_size"], d)}
  for i in range(c["n_layers"]):
    at, ffn = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
    norms |= {f"layers.{i}.attention_norm": d, f"layers.{i}.ffn_norm": d}
    if c["apply_qk_norm"]:
      norms |= {f"{at}{'_totrain_' if linear else ''}{x}_norm": h * k for x in "qk"}
    result |= {at + "in_proj.weight": (h * k + g * k + g * v, d), at + "out_proj.weight": (d, h * v)}
    if linear:
      result |= {at + "_totrain_embed.weight": (h * k, h * k), at + "_totrain_embed.bias": (h * k,)}
      if g < h:
        result |= {at + "_totrain_embed_kv.weight": (g * k, g * k), at + "_totrain_embed_kv.bias": (g * k,)}
    result |= {ffn + "w12.weight": (2 * f, d), ffn + "w3.weight": (d, f)}
  has_bias = c["norm_type"] in ("default_layer_norm", "lp_layer_norm")
  for name, width in norms.items():
    result |= {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if has_bias else {})
  return result


def random_tensors(c: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """No gain is 1 and no bias is 0. Biases of phi keep its features away from 0."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in shapes(c).items():
    x = rng.standard_normal(shape, np.float32)
    if len(shape) == 2 and name != "tok_embeddings.weight":
      x /= np.float32(math.sqrt(shape[1]))
    elif name.endswith("weight") and len(shape) == 1:
      x = 1 + np.float32(0.3) * x
    elif name.endswith("bias"):
      x = np.float32(0.3) * x + np.float32(1.0 if "_totrain_" in name else 0.0)
    tensors[name] = x
  if c.get("weight_tying"):
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
  return tensors


def _norm(x, c, t, name):
  if c["norm_type"] != "rms_norm":
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c["norm_eps"]) * t[f"{name}.weight"]
  return x + t.get(f"{name}.bias", 0.0)


def _rotate(x_THK, c):
  kind, (time, heads, k) = c["positional_embedding_type"], x_THK.shape
  if kind == "none":
    return x_THK
  plain = kind == "rotary"
  base, scale = (c.get("rotary_base_frequency", 1e4), c.get("rotary_scale", 1.0)) if plain else (1e4, 1.0)
  frequency = 1 / (scale * base ** (np.arange(0, k, 2) / k))
  places = np.arange(heads)[None, :, None] if kind == "head_rotary" else np.arange(time)[:, None, None]
  turn = np.exp(1j * places * frequency)
  if kind == "llama_rotary":
    z = (x_THK[..., ::2] + 1j * x_THK[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x_THK.shape)
  z = (x_THK[..., : k // 2] + 1j * x_THK[..., k // 2 :]) * turn
  return np.concatenate([z.real, z.imag], -1)


def _slopes(c):
  h = c["n_heads"]
  if not c["use_decay"]:
    return np.zeros(h)
  if c["use_retnet_slopes"]:
    return -np.log(1 - 2.0 ** (-5 - np.arange(h)))
  ratio = 2.0 ** -(2.0 ** -(math.log2(h) - 3))
  return (c["decay_start"] or ratio) * ratio ** np.arange(h)


def _attention(x, c, t, at):
  h, g, k, v = c["n_heads"], c["n_heads_kv"], c["qk_head_dim"], c["v_head_dim"]
  time, linear = len(x), c["attn_name"] == "linear_attn"
  q, keys, values = np.split(x @ t[at + "in_proj.weight"].T, np.cumsum([h * k, g * k]), axis=1)
  values = values.reshape(time, g, v).repeat(h // g, 1)
  far = np.arange(time)[:, None] - np.arange(time)
  if not linear:
    if c["apply_qk_norm"]:
      q, keys = _norm(q, c, t, at + "q_norm"), _norm(keys, c, t, at + "k_norm")
    q, keys = _rotate(q.reshape(time, h, k), c), _rotate(keys.reshape(time, g, k), c).repeat(h // g, 1)
    scores = np.where(far < 0, -np.inf, np.einsum("thk,shk->hts", q, keys) / math.sqrt(k))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shv->thv", weights, values).reshape(time, -1) @ t[at + "out_proj.weight"].T
  own = "_totrain_embed" + ("_kv" if g < h else "")
  q, keys = (
    np.maximum(y @ t[f"{at}{name}.weight"].T + t[f"{at}{name}.bias"], 0)
    for y, name in ((q, "_totrain_embed"), (keys, own))
  )
  q, keys = q.reshape(time, h, k), keys.reshape(time, g, k).repeat(h // g, 1)
  if c["apply_qk_norm"]:
    q, keys = (
      _norm(y.reshape(time, -1), c, t, f"{at}_totrain_{n}_norm").reshape(time, h, k) for y, n in ((q, "q"), (keys, "k"))
    )
  q, keys = _rotate(q, c), _rotate(keys, c) / math.sqrt(k)
  decay = np.where(far < 0, 0, np.exp(-_slopes(c)[:, None, None] * np.maximum(far, 0)))
  out = np.einsum("hts,shv->thv", np.einsum("thk,shk->hts", q, keys) * decay, values)
  out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
  return out.reshape(time, -1) @ t[at + "out_proj.weight"].T


def logits(c: dict, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
  """Float64 [B, T, vocabulary]."""
  t = {name: np.float64(tensor) for name, tensor in tensors.items()}
  rows = []
  for row in tokens:
    x = t["tok_embeddings.weight"][row]
    if c.get("post_embed_norm"):
      x = _norm(x, c, t, "post_embed_norm")
    for i in range(c["n_layers"]):
      at = f"layers.{i}."
      x = x + _attention(_norm(x, c, t, at + "attention_norm"), c, t, at + "attention.")
      gate, up = np.split(_norm(x, c, t, at + "ffn_norm") @ t[at + "feed_forward.w12.weight"].T, 2, axis=1)
      x = x + gate / (1 + np.exp(-gate)) * up @ t[at + "feed_forward.w3.weight"].T
    rows.append(_norm(x, c, t, "norm") @ t["output.weight"].T)
  return np.stack(rows)
