"""How similar a model's attention matrices are to its teacher's (appendix A of arXiv 2405.06640, figures 3 and 4).

Let A be the teacher's matrix of one head and L the model's of the same head (`attention_matrices`), on the same text.
Each model reads the text by itself, so that L also shows what earlier layers of the model do differently. There are two
forms of L:

  raw  L as it is, before the GroupNorm, which would take out the size of each row.
  row  each row of L divided by the absolute value of its sum, so that rows sum to 1 or -1, as those of A do to 1.

and by two measures:

  cosine    sum_ij A_ij L_ij / (|A| |L|) over the causal entries j <= i; |.| is the Frobenius norm.
  singular  |s(L) - s(A)| / |s(A)|, where s(.) is the vector of singular values in descending order and |.| the L2 norm.

All that follows the matrices is computed in float64.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from supra_jax.analysis.attention_matrices import LayerMatrices, attention_matrices
from supra_jax.core import plain_json
from supra_jax.core.progress import Progress
from supra_jax.inference.lm import LM

ITSELF, ANOTHER_TEXT = "teacher itself", "teacher on another text"  # names of the controls in `Similarity.scores`
FORMS, MEASURES = ("raw", "row"), ("cosine", "singular")
_ROUNDING = 1e-6  # a row sum below this share of the sum of absolute values is rounding error of float32 weights


@dataclasses.dataclass(frozen=True)
class Scores:
  """The measures of each head, averaged over texts: float64 [layers, H]; NaN in layers that are skipped.

  Attributes:
    cosine: cosine similarity, -1 to 1.
    singular: relative distance of the singular values, at least 0.
  """

  cosine: np.ndarray
  singular: np.ndarray


@dataclasses.dataclass(frozen=True)
class Similarity:
  """What `compare` returns.

  Attributes:
    layers: indices of the layers that were compared, in ascending order.
    num_texts: number of texts that the scores are averaged over.
    num_tokens: T, number of tokens of each text.
    scores: {name of what was compared with the teacher: {form: scores}}. The names are those of the models; ITSELF, a
      control whose scores are 1 and 0; and, if there are several texts, ANOTHER_TEXT, the control that compares the
      teacher's matrices on two different texts. Controls have the form "raw" alone, since the rows of A sum to 1.
    skipped: {name of a model: {layer: mixer}} of layers whose mixer has no such matrix.
  """

  layers: tuple[int, ...]
  num_texts: int
  num_tokens: int
  scores: Mapping[str, Mapping[str, Scores]]
  skipped: Mapping[str, Mapping[int, str]]

  def summary(self) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Returns {name: {form: {measure: {"mean": ..., "median": ...}}}} over all heads of layers that were not skipped.

    Both are None if all layers were skipped. A few heads may have distances thousands of times those of the others,
    which are then all that the mean shows.
    """

    def both(values: np.ndarray) -> dict[str, float | None]:
      known = values[~np.isnan(values)]
      return {stat.__name__: float(stat(known)) if known.size else None for stat in (np.mean, np.median)}

    return {
      name: {form: {measure: both(getattr(scores, measure)) for measure in MEASURES} for form, scores in forms.items()}
      for name, forms in self.scores.items()
    }

  def plain(self) -> dict[str, Any]:
    """Returns the result as JSON values, and `summary` with it; scores of skipped layers are NaN, null in JSON."""
    scores = {
      name: {form: {measure: getattr(scores, measure).tolist() for measure in MEASURES} for form, scores in of.items()}
      for name, of in self.scores.items()
    }
    skipped = {name: {str(i): mixer for i, mixer in layers.items()} for name, layers in self.skipped.items()}
    plain = {"layers": self.layers, "num_texts": self.num_texts, "num_tokens": self.num_tokens}
    return {**plain, "summary": self.summary(), "skipped": skipped, "scores": scores}

  def to_json(self, **how: Any) -> str:
    """Returns `plain` as JSON text.

    Args:
      **how: further arguments of `json.dumps`.
    """
    return plain_json.to_json(self.plain(), **how)

  @classmethod
  def from_json(cls, text: str) -> Similarity:
    """Returns what `to_json` was made of.

    Raises:
      ValueError: `text` is not JSON.
      KeyError: a part is missing.
    """
    plain = json.loads(text)
    return cls(
      layers=tuple(plain["layers"]),
      num_texts=plain["num_texts"],
      num_tokens=plain["num_tokens"],
      scores={
        name: {form: Scores(*(np.array(scores[name], float) for name in MEASURES)) for form, scores in forms.items()}
        for name, forms in plain["scores"].items()
      },
      skipped={name: {int(i): mixer for i, mixer in layers.items()} for name, layers in plain["skipped"].items()},
    )


def compare(
  teacher: LM,
  models: Mapping[str, LM],
  texts: Sequence[Sequence[int]] | np.ndarray,
  *,
  layers: Collection[int] | None = None,
  progress: bool = False,
) -> Similarity:
  """Compares the attention matrices of models with their teacher's, layer by layer and head by head.

  The singular values take the most time, which grows with the cube of T: 2 models + 1 decompositions of a [T, T] matrix
  for each text, layer and head.

  Args:
    teacher: the model with softmax attention.
    models: name -> a model that was made of the teacher, e.g. before and after uptraining.
    texts: the token ids of each text, all of the same length T. The model reads each text as one document.
    layers: indices of the layers to compare; None: all.
    progress: whether to show progress on stderr.

  Returns:
    The scores of each model and of the controls.

  Raises:
    ValueError: there is no text or no layer, texts differ in length, a token is not in the vocabulary, a layer does not
      exist, a layer of the teacher that is compared is not softmax, a model has another number of layers or heads than
      the teacher or the name of a control, or a model's matrices are not finite.
  """
  tokens_BT = _checked_texts(texts, min(lm.config.vocab_size for lm in (teacher, *models.values())))
  chosen = _checked_layers(teacher, layers)
  _check_models(teacher, models)
  batch, time = tokens_BT.shape
  found: dict[tuple[str, str], list[np.ndarray]] = {}
  skipped: dict[str, dict[int, str]] = {name: {} for name in models}
  walks = [attention_matrices(lm, tokens_BT, chosen) for lm in (teacher, *models.values())]
  shape = (len(MEASURES), teacher.config.num_heads)
  # Matrices as small as these take no less time on several threads, and a hundred times more where cores are shared:
  # threads of OpenBLAS wait for each other in a loop.
  with (
    threadpool_limits(1, "blas"),
    Progress(len(chosen), "Comparing, {done} of {total} layers", enabled=progress, unit="layer") as shown,
  ):
    for theirs, *ours in zip(*walks, strict=True):
      of_models = dict(zip(models, ours, strict=True))
      skipped_here = {name: matrices.mixer for name, matrices in of_models.items() if not matrices.exist}
      scores = {(name, form): np.full(shape, np.nan) for name in skipped_here for form in FORMS}
      scores |= _mean(_of_layer(theirs, {name: of for name, of in of_models.items() if name not in skipped_here}))
      for name, mixer in skipped_here.items():
        skipped[name][theirs.layer] = mixer
      for key, values in scores.items():
        found.setdefault(key, []).append(values)
      shown.advance(1)
  names = [*models, ITSELF, *([ANOTHER_TEXT] if batch > 1 else [])]
  by_name = {
    name: {form: Scores(*np.stack(found[name, form], axis=1)) for form in FORMS if (name, form) in found}
    for name in names
  }
  return Similarity(chosen, batch, time, by_name, skipped)


def _of_layer(
  theirs: LayerMatrices, models: Mapping[str, LayerMatrices]
) -> Iterator[dict[tuple[str, str], np.ndarray]]:
  """Yields {(name, form): float64 [measures, H]} of each text."""
  batch = theirs.num_texts
  first = teacher = _Measured(theirs.of(0))
  for text in range(batch):
    scores = {(ITSELF, "raw"): teacher.against(teacher)}
    for name, matrices in models.items():
      raw = matrices.of(text)
      if not np.isfinite(raw).all():
        raise ValueError(f"{name}: the attention matrices of layer {theirs.layer} are not finite on text {text}.")
      scores[name, "raw"] = _Measured(raw).against(teacher)
      scores[name, "row"] = _Measured(divided_by_row_sums(raw)).against(teacher)
    if batch > 1:
      other = first if text + 1 == batch else _Measured(theirs.of(text + 1))
      scores[ANOTHER_TEXT, "raw"] = other.against(teacher)
      teacher = other  # that of the next text
    yield scores


class _Measured:
  """Matrices [H, T, T] with their singular values, which several comparisons share."""

  def __init__(self, matrices_HTT: np.ndarray):
    self.matrices, self.singular = matrices_HTT, singular_values(matrices_HTT)

  def against(self, teacher: _Measured) -> np.ndarray:
    """Returns both measures, float64 [measures, H]."""
    cosine = cosine_similarity(teacher.matrices, self.matrices)
    return np.stack([cosine, singular_distance(teacher.singular, self.singular)])


def divided_by_row_sums(matrices_HTT: np.ndarray) -> np.ndarray:
  """Returns matrices whose rows are divided by the absolute value of their sum, float64 [H, T, T].

  A row whose sum is 0, or so small beside the row's entries that it is rounding error, is returned as it is: with RoPE
  some weights of linear attention are negative, and with relu all weights of a row may be 0.

  Args:
    matrices_HTT: float [H, T, T].
  """
  matrices = np.asarray(matrices_HTT, np.float64)
  sums, sizes = np.abs(matrices.sum(-1, keepdims=True)), np.abs(matrices).sum(-1, keepdims=True)
  divided: np.ndarray = matrices / np.where(sums > _ROUNDING * sizes, sums, 1)
  return divided


def cosine_similarity(theirs_HTT: np.ndarray, ours_HTT: np.ndarray) -> np.ndarray:
  """Returns the cosine of the angle between two matrices over the causal entries, j <= i, float64 [H].

  0 where one of the matrices is 0, as that of a head is whose features phi are all 0.

  Args:
    theirs_HTT, ours_HTT: float [H, T, T]; entries above the diagonal are not read.
  """
  theirs, ours = (np.tril(np.asarray(x, np.float64)).reshape(len(x), -1) for x in (theirs_HTT, ours_HTT))
  norms = np.linalg.norm(theirs, axis=-1) * np.linalg.norm(ours, axis=-1)
  cosine: np.ndarray = (theirs * ours).sum(-1) / np.where(norms > 0, norms, 1)
  return cosine


def singular_values(matrices_HTT: np.ndarray) -> np.ndarray:
  """Returns the singular values of each matrix in descending order, float64 [H, T], of float [H, T, T]."""
  return np.linalg.svd(np.asarray(matrices_HTT, np.float64), compute_uv=False)


def singular_distance(theirs_HT: np.ndarray, ours_HT: np.ndarray) -> np.ndarray:
  """Returns `|ours - theirs| / |theirs|` with L2 norms, float64 [H].

  Args:
    theirs_HT, ours_HT: singular values in descending order, float [H, T]; those of the teacher are not all 0.
  """
  distance: np.ndarray = np.linalg.norm(ours_HT - theirs_HT, axis=-1) / np.linalg.norm(theirs_HT, axis=-1)
  return distance


def _mean(texts: Iterator[dict[tuple[str, str], np.ndarray]]) -> dict[tuple[str, str], np.ndarray]:
  of_texts = list(texts)
  return {key: np.mean([scores[key] for scores in of_texts], axis=0) for key in of_texts[0]}


def _checked_texts(texts: Sequence[Sequence[int]] | np.ndarray, vocab_size: int) -> np.ndarray:
  """Returns the texts as int [B, T]."""
  lengths = sorted({len(text) for text in texts})
  if len(lengths) != 1 or not lengths[0]:
    raise ValueError(f"There are {len(texts)} texts of {lengths} tokens: wanted texts that all have the same length.")
  tokens_BT = np.asarray(texts)
  if not np.issubdtype(tokens_BT.dtype, np.integer):
    raise ValueError(f"texts are {tokens_BT.dtype}: wanted the token ids of each text.")
  outside = tokens_BT[(tokens_BT < 0) | (tokens_BT >= vocab_size)]
  if outside.size:
    raise ValueError(f"Token {outside[0]} is not in the vocabulary, 0 to {vocab_size - 1}.")
  return tokens_BT


def _checked_layers(teacher: LM, layers: Collection[int] | None) -> tuple[int, ...]:
  """Returns the layers to compare in ascending order."""
  number, mixers = teacher.config.num_layers, teacher.config.mixers
  chosen = tuple(range(number)) if layers is None else tuple(sorted(set(layers)))
  if not chosen or not 0 <= chosen[0] <= chosen[-1] < number:
    raise ValueError(f"layers={list(chosen)}: wanted at least one of 0 to {number - 1}.")
  if others := [i for i in chosen if mixers[i] != "softmax"]:
    raise ValueError(f"Layer {others[0]} of the teacher is {mixers[others[0]]!r}: wanted softmax attention.")
  return chosen


def _check_models(teacher: LM, models: Mapping[str, LM]) -> None:
  wanted = (teacher.config.num_layers, teacher.config.num_heads)
  for name, lm in models.items():
    if name in (ITSELF, ANOTHER_TEXT):
      raise ValueError(f"A model is called {name!r}, which is the name of a control: wanted another name.")
    given = (lm.config.num_layers, lm.config.num_heads)
    if given != wanted:
      raise ValueError(
        f"{name} has {given[0]} layers of {given[1]} heads: wanted the teacher's {wanted[0]} and {wanted[1]}."
      )
