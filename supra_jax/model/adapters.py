"""Low-rank adapters (LoRA, Hu et al. 2021): W + A B in place of a kernel W, where A and B are trained and W is not."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from supra_jax.core.schema import AtLeast, check, check_regex
from supra_jax.model.layers import ADAPTERS
from supra_jax.model.registry import takes_adapters


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Rank of the adapters, and which kernels have adapters.

  Attributes:
    rank: r of the factors A [I, r] and B [r, O]; 0 means no adapters.
    kernels: regex; a kernel has adapters if the regex is found in the kernel's path, such as
      "run_0/self_attn/q_proj/kernel".
  """

  rank: Annotated[int, AtLeast(0)] = 0
  kernels: str = "self_attn/[qkvo]_proj/"

  def __post_init__(self):
    check(self, "adapters")
    check_regex("adapters.kernels", self.kernels)


def add_adapters(params: Mapping[str, Any], config: AdapterConfig, seed: int) -> dict[str, Any]:
  """Returns parameters with float32 adapters A and B beside kernels of `Dense`; the model's output does not change yet.

  A is drawn from U(-1/sqrt(I), 1/sqrt(I)), as in LoRA's own code, and B is 0. A B is not scaled: LoRA's alpha is r.

  Args:
    params: nested dict of parameters, with one subtree per layer or per stack of layers.
    config: which kernels; its rank is 1 or more.
    seed: seeds the draw of every A, together with the path of the kernel.

  Raises:
    ValueError: `config.kernels` finds no kernel that can have adapters.
  """
  found = False

  def walk(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    nonlocal found
    tree = {name: walk(leaf, f"{path}{name}/") if isinstance(leaf, Mapping) else leaf for name, leaf in tree.items()}
    if "kernel" in tree and re.search(config.kernels, path + "kernel") and takes_adapters(path + "kernel"):
      found = True
      *lead, inputs, outputs = tree["kernel"].shape
      key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
      bound = 1 / math.sqrt(inputs)
      a = jax.random.uniform(key, (*lead, inputs, config.rank), jnp.float32, -bound, bound)
      tree |= dict(zip(ADAPTERS, (a, jnp.zeros((*lead, config.rank, outputs), jnp.float32)), strict=True))
    return tree

  made = walk(params, "")
  if not found:
    raise ValueError(f"adapters.kernels={config.kernels!r} finds no kernel of a projection.")
  return made


def merge_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns parameters with W + A B in place of each W, and without adapters; the model computes the same."""
  if ADAPTERS[0] not in params:
    return {name: merge_adapters(leaf) if isinstance(leaf, Mapping) else leaf for name, leaf in params.items()}
  a, b = (params[name] for name in ADAPTERS)
  kernel = params["kernel"] + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).astype(params["kernel"].dtype)
  return {name: leaf for name, leaf in params.items() if name not in ADAPTERS} | {"kernel": kernel}
