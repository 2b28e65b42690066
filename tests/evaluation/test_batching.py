"""How pieces of many lengths are divided into batches."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np

from supra_jax.evaluation.batching import CALL, batches, room_for, width_for


def rows_for(width):
  return 1 << max(256 // width, 1).bit_length() - 1


def padded(made):
  return sum(rows * width for _, (rows, width) in made)


@hypothesis.given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([0.0, 100.0, 5000.0]))
@hypothesis.settings(deadline=None, max_examples=200)
def test_every_piece_is_in_one_batch_that_it_fits(lengths, new_shape):
  made = batches(lengths, rows_for, (), new_shape)
  assert sorted(i for taken, _ in made for i in taken) == list(range(len(lengths)))
  for taken, (rows, width) in made:
    assert 0 < len(taken) <= rows <= rows_for(width)
    assert max(lengths[i] for i in taken) <= width


def test_few_pieces_share_shapes_and_many_pad_little():
  lengths = np.random.default_rng(0).integers(1, 40, 2000).tolist()
  few, many = (batches(some, rows_for, (), 1000.0) for some in (lengths[:40], lengths))
  assert len({shape for _, shape in few}) < len({shape for _, shape in many}) <= 12
  assert padded(many) < 1.25 * sum(lengths)
  free = {shape for _, shape in batches(lengths, rows_for, (), 0.0)}
  assert padded(batches(lengths[:40], rows_for, free, 1000.0)) <= padded(few)


@hypothesis.given(st.lists(st.sampled_from([3, 7, 11, 15, 19]), min_size=1, max_size=30))
@hypothesis.settings(deadline=None, max_examples=50)
def test_the_cheapest_of_all_divisions(lengths):
  """Against all ways to divide the widths into runs, each of full batches and quarters."""

  def cost(made):
    return sum(rows * width + CALL for rows, width in made)

  widths = sorted({width_for(n) for n in lengths})
  best = None
  for cuts in itertools.product([False, True], repeat=len(widths) - 1):
    runs = [[widths[0]]]
    for cut, width in zip(cuts, widths[1:], strict=True):
      runs.append([width]) if cut else runs[-1].append(width)
    total = 0
    for run in runs:
      number, width = sum(width_for(n) in run for n in lengths), run[-1]
      most = rows_for(width)
      quarter = max(most // 4, 1)
      options = [(full, -(-max(number - full * most, 0) // quarter)) for full in range(-(-number // most) + 1)]
      total += min(cost([(most, width)] * full + [(quarter, width)] * parts) for full, parts in options)
    best = total if best is None else min(best, total)
  assert cost([shape for _, shape in batches(lengths, rows_for, (), 0.0)]) <= best


def test_rounding():
  assert [width_for(n) for n in (1, 4, 5, 31, 32, 33, 64, 65, 2047)] == [4, 4, 8, 32, 32, 40, 64, 80, 2048]
  assert [room_for(n) for n in (1, 64, 65, 97, 129, 385)] == [64, 64, 96, 128, 192, 512]
