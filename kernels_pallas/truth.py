"""The definition of linear attention and of its gradients, token by token in float64 numpy, and cases to compare on.

Shares no code with the implementations. A case is a dict of numpy arrays: q, k, v, slopes, and where present
initial_state, segment_ids and lengths, with the shapes that `kernels_pallas.linear_attention` takes.
"""

from collections.abc import Collection, Mapping

import numpy as np

SCALE = 0.3
SLOPES = (0.0, 0.01, 0.2, 1.0, 4.0, 14.0)  # decay per token from none to all
OPTIONS = ("initial_state", "segment_ids", "lengths")
Case = dict[str, np.ndarray]


def make_case(
  num_tokens: int,
  key_groups: int,
  value_groups: int,
  given: Collection[str] = OPTIONS,
  *,
  batch: int = 2,
  heads: int = 6,
  key_width: int = 8,
  value_width: int = 5,
  seed: int = 0,
) -> Case:
  """Draws a case in float32, with NaN at the padding of its second row.

  Args:
    num_tokens: T.
    key_groups, value_groups: heads of k and of v; divisors of `heads`.
    given: those of OPTIONS that the case has.
    batch, heads, key_width, value_width: B, H, K, V; at most six heads.
    seed: seed of the draw.
  """
  rng = np.random.default_rng(seed)
  case = {
    "q": rng.standard_normal((batch, num_tokens, heads, key_width)),
    "k": rng.standard_normal((batch, num_tokens, key_groups, key_width)),
    "v": rng.standard_normal((batch, num_tokens, value_groups, value_width)),
    "slopes": np.array(SLOPES[:heads]),
  }
  case = {name: x.astype(np.float32) for name, x in case.items()}
  if "initial_state" in given:
    case["initial_state"] = rng.standard_normal((batch, heads, key_width, value_width)).astype(np.float32)
  if "segment_ids" in given:  # ids out of {3, 5}: each comes back again and again
    changes = rng.random((batch, num_tokens)) < 0.08
    case["segment_ids"] = np.where(np.cumsum(changes, axis=1) % 2, 5, 3).astype(np.int32)
  if "lengths" in given:  # one row has padding, at times nothing else
    case["lengths"] = np.array([num_tokens, num_tokens * 3 // 4][:batch], np.int32)
    for name in ("q", "k", "v"):
      case[name][1, case["lengths"][1] :] = np.nan
  return case


def cotangents(case: Mapping[str, np.ndarray], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Draws cotangents of the output, [B, T, H, V], and of the final state, [B, H, K, V], in float32."""
  rng = np.random.default_rng(seed)
  batch, num_tokens, heads, key_width = case["q"].shape
  value_width = case["v"].shape[-1]
  return (
    rng.standard_normal((batch, num_tokens, heads, value_width)).astype(np.float32),
    rng.standard_normal((batch, heads, key_width, value_width)).astype(np.float32),
  )


def by_loop(case: Mapping[str, np.ndarray], given_cotangents: tuple | None = None) -> dict[str, np.ndarray]:
  """Computes a case by the definition and its transpose, in float64.

  Args:
    case: the case.
    given_cotangents: of output and final state; None means those of `cotangents`.

  Returns:
    {"output", "state", "d_q", "d_k", "d_v", and "d_initial_state" if the case has an initial state}.
  """
  q, k, v, gamma = (case[name].astype(np.float64) for name in ("q", "k", "v", "slopes"))
  gamma = np.exp(-gamma)
  d_output, d_state = (x.astype(np.float64) for x in given_cotangents or cotangents(case))
  batch, num_tokens, heads, _ = q.shape
  segment_ids = case.get("segment_ids", np.zeros((batch, num_tokens)))
  lengths = case.get("lengths", np.full(batch, num_tokens))
  before = case.get("initial_state", np.zeros(d_state.shape)).astype(np.float64)

  out = {"output": np.zeros(d_output.shape), "state": np.zeros(d_state.shape)}
  out |= {"d_q": np.zeros(q.shape), "d_k": np.zeros(k.shape), "d_v": np.zeros(v.shape), "d_initial_state": 0 * before}
  for b, h in np.ndindex(batch, heads):
    gk, gv = h // (heads // k.shape[2]), h // (heads // v.shape[2])
    seam = np.append(False, segment_ids[b, 1:] != segment_ids[b, :-1])
    states = [before[b, h]]
    for t in range(lengths[b]):
      states.append((0 if seam[t] else gamma[h]) * states[-1] + np.outer(k[b, t, gk], v[b, t, gv]))
      out["output"][b, t, h] = SCALE * q[b, t, h] @ states[-1]
    out["state"][b, h] = states[-1]

    d_after = d_state[b, h]
    for t in reversed(range(lengths[b])):
      out["d_q"][b, t, h] = SCALE * states[t + 1] @ d_output[b, t, h]
      d_after = d_after + SCALE * np.outer(q[b, t, h], d_output[b, t, h])
      out["d_k"][b, t, gk] += d_after @ v[b, t, gv]
      out["d_v"][b, t, gv] += k[b, t, gk] @ d_after
      d_after = (0 if seam[t] else gamma[h]) * d_after
    out["d_initial_state"][b, h] = d_after
  if "initial_state" not in case:
    del out["d_initial_state"]
  return out


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
  """Returns the largest difference, relative to the largest number that is expected; NaN if `actual` holds NaN."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))
