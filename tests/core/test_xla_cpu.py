"""What a CPU computes in other ways is what the plain einsum gives, and takes no copy of a matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.core import xla_cpu
from supra_jax.model.int8 import Int8, in_int8
from supra_jax.model.layers import Embed, product

FORMS = {"kernel": ("abi,io->abo", (64, 48)), "embedding": ("abi,oi->abo", (48, 64))}


def _drawn(shape, dtype="float32", seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_products_without_a_gradient(name, batch, dtype):
  equation, shape = FORMS[name]
  with jax.enable_x64(dtype == "float64"):
    x, matrix = _drawn((batch, 1, 64), dtype), _drawn(shape, dtype, 1)
    want = jnp.einsum(equation, x, matrix, preferred_element_type=jnp.promote_types(dtype, jnp.float32))
    got = jax.jit(product, static_argnums=(0, 1, 2))(equation, dtype, dtype, x, matrix)
    np.testing.assert_allclose(
      got, want.astype(dtype), rtol=1e-2 if len(dtype) > 7 or dtype == "float16" else 1e-5, atol=1e-4
    )
    assert got.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("batch", [1, 4, 5, 40])
@pytest.mark.parametrize("shape", [(64, 48), (1024, 1100), (53, 59)], ids=str)
def test_int8(name, batch, shape, monkeypatch):
  monkeypatch.setattr(xla_cpu, "_BLOCK_BYTES", 2**17)
  equation, _ = FORMS[name]
  matrix = np.asarray(_drawn(shape)) * np.geomspace(0.01, 10, shape[1])
  held = in_int8({name: matrix})[name]
  wide = held.values * np.expand_dims(held.scale, held.inputs)
  assert (np.abs(wide - matrix) <= np.expand_dims(held.scale, held.inputs) * 0.501).all()
  x = _drawn((batch, 1, shape[held.inputs]), seed=1) * 3
  for dtype, rtol in (("float32", 1e-4), ("bfloat16", 2e-2)):
    got = jax.jit(product, static_argnums=(0, 1, 2))(equation, dtype, "float32", x, held)
    want = np.einsum(equation, np.asarray(x, np.float64), wide.astype(np.float64))
    np.testing.assert_allclose(got, want, atol=rtol * np.abs(want).max(), rtol=0)
  # One entry a thousand times the others, whose output does not count: the others are exact all the same.
  x, wide = x.at[..., 0].multiply(1000), np.array(wide)
  held = held.replace(values=np.array(held.values))
  for array in (wide, held.values):
    np.moveaxis(array, held.inputs, 0)[0] = 0
  got = jax.jit(product, static_argnums=(0, 1, 2))(equation, "float32", "float32", x, held)
  want = np.einsum(equation, np.asarray(x, np.float64), wide.astype(np.float64))
  np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_table_and_their_gradient(dtype):
  ids, table = jnp.asarray([[3, 0], [7, 3]]), _drawn((9, 6), dtype)
  rows = jax.jit(lambda table: Embed(9, 6, dtype).apply({"params": {"embedding": table}}, ids))
  np.testing.assert_array_equal(rows(table), table[ids])
  grad = jax.grad(lambda table: (rows(table).astype(jnp.float32) * jnp.arange(6.0)).sum())(table)
  want = np.bincount(np.asarray(ids).ravel(), minlength=9)[:, None] * np.arange(6.0)
  np.testing.assert_array_equal(grad, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_loop_takes_no_copy_of_a_matrix(dtype, monkeypatch):
  """As decoding does: eight steps in a scan, one or more rows."""
  monkeypatch.setattr(xla_cpu, "_BLOCK_BYTES", 2**17)
  table, kernel = _drawn((4096, 256), "bfloat16"), _drawn((256, 256), "bfloat16", 1)
  params = {"embedding": table, "kernel": kernel}
  if dtype == "int8":
    params = jax.tree.map(jnp.asarray, in_int8(params))

  def step(params, ids, _):
    x = Embed(4096, 256, jnp.bfloat16).apply({"params": {"embedding": params["embedding"]}}, ids)
    x = product("abi,io->abo", jnp.bfloat16, jnp.bfloat16, x, params["kernel"])
    logits = product("abi,oi->abo", jnp.bfloat16, jnp.float32, x, params["embedding"])
    return jnp.argmax(logits, -1).astype(jnp.int32), None

  @jax.jit
  def run(params, ids):
    return jax.lax.scan(lambda ids, _: step(params, ids, _), ids, length=8)[0]

  for batch in (1, 3, 8):
    made = run.lower(params, jnp.zeros((batch, 1), jnp.int32)).compile()
    smallest = table.nbytes // 4 if dtype == "int8" else table.nbytes // 2
    assert made.memory_analysis().temp_size_in_bytes < smallest, batch


def test_int8_is_a_tree_of_two_arrays():
  held = in_int8({"a": {"kernel": np.ones((3, 4)), "bias": np.ones(4)}}, jnp.bfloat16)
  assert isinstance(held["a"]["kernel"], Int8) and held["a"]["bias"].dtype == jnp.bfloat16
  assert [x.shape for x in jax.tree.leaves(held["a"]["kernel"])] == [(3, 4), (4,)]
