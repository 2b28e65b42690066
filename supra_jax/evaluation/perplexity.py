"""Computes the loss of a text, token by token: in windows with a stride, or read once with the state carried on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from supra_jax.core.progress import Progress
from supra_jax.core.sharding import on_mesh
from supra_jax.data.text import read_documents
from supra_jax.inference.decode import capacity_for
from supra_jax.inference.lm import LM
from supra_jax.model.finite import not_finite
from supra_jax.model.placement import placed
from supra_jax.objectives.heldout import perplexity, token_nll

Bos = Literal["text", "windows", "never"]
BATCH_TOKENS = 4096  # tokens that the model reads at a time, unless told otherwise
PIECE_TOKENS = 1024  # tokens that the model reads at a time of a text without windows


@dataclasses.dataclass(frozen=True)
class TextLoss:
  """Loss of a text, token by token. The N scored tokens are in the order of the text, each of them once.

  Attributes:
    nll: float32 [N], negative log-likelihood in nats.
    position: int32 [N], number of tokens that the model had read in the window before it met the scored token.
    window: int32 [N], index of the window that the token was scored in.
    begins: int [W], index in the text of each window's first token.
    sequence_length: tokens of a window; 0: the text was read once.
    stride: tokens from the beginning of a window to that of the next; 0: the text was read once.
    bos: where begin-of-text tokens were read.
  """

  nll: np.ndarray
  position: np.ndarray
  window: np.ndarray
  begins: np.ndarray
  sequence_length: int
  stride: int
  bos: Bos

  @property
  def mean(self) -> float:
    """Mean negative log-likelihood in nats per scored token."""
    return float(self.nll.mean(dtype=np.float64))

  @property
  def targets(self) -> int:
    """N, the number of scored tokens."""
    return self.nll.size

  @property
  def how(self) -> str:
    """Says in words how the text was read."""
    bos = {
      "never": "no begin-of-text token",
      "text": "a begin-of-text token before the text",
      "windows": "a begin-of-text token before each window",
    }[self.bos]
    cut = "the whole text read once"
    if self.sequence_length:
      cut = f"pieces of {self.sequence_length}"
      cut += f", one every {self.stride} tokens" if self.stride < self.sequence_length else ""
    return f"{cut}, {bos}"

  def by_position(self, per_doubling: int = 4) -> list[dict[str, Any]]:
    """Returns the mean loss of each span of positions: [{"first", "last", "loss", "targets"}].

    Args:
      per_doubling: number of spans from a position to twice that position.
    """
    farthest = int(self.position.max())
    firsts = sorted({int(2 ** (k / per_doubling)) for k in range(per_doubling * farthest.bit_length() + 1)})
    firsts = [first for first in firsts if first <= farthest]
    spans = np.searchsorted(firsts, self.position, side="right") - 1
    lasts = [*(first - 1 for first in firsts[1:]), farthest]
    means = zip(*self._means(spans, len(firsts)), strict=True)
    rows = zip(firsts, lasts, means, strict=True)
    return [{"first": first, "last": last, "loss": loss, "targets": n} for first, last, (loss, n) in rows if n]

  def by_window(self) -> list[dict[str, Any]]:
    """Returns the mean loss of each window: [{"begin", "loss", "targets"}]; `begin` is a token's index in the text."""
    rows = zip(self.begins.tolist(), *self._means(self.window, self.begins.size), strict=True)
    return [{"begin": begin, "loss": loss, "targets": n} for begin, loss, n in rows]

  def _means(self, groups: np.ndarray, count: int) -> tuple[list[float], list[int]]:
    targets = np.bincount(groups, minlength=count)
    sums = np.bincount(groups, weights=self.nll.astype(np.float64), minlength=count)
    return (sums / np.maximum(targets, 1)).tolist(), targets.tolist()

  def values(self) -> dict[str, Any]:
    """Returns all but the tokens' own losses, for JSON."""
    about: dict[str, Any] = {"loss": self.mean, "perplexity": perplexity(self.mean), "targets": self.targets}
    about |= {"sequence_length": self.sequence_length, "stride": self.stride, "bos": self.bos}
    return about | {"by_position": self.by_position(), "by_window": self.by_window()}

  def __str__(self) -> str:
    """Returns a line with loss and perplexity, and a table of the loss by position, with a row a doubling."""
    said = f"loss {self.mean:.4f} nats a token, perplexity {perplexity(self.mean):.3f}, {self.targets} tokens"
    rows = [(f"{row['first']}-{row['last']}", row["loss"], row["targets"]) for row in self.by_position(1)]
    table = [f"  {'tokens read before':>18}  {'loss':>7}  {'tokens':>8}"]
    return "\n".join([f"{said}, {self.how}", *table, *(f"  {span:>18}  {loss:7.4f}  {n:>8}" for span, loss, n in rows)])


def evaluate_text(
  lm: LM,
  text: str,
  *,
  text_key: str = "text",
  max_tokens: int = 0,
  bos: Bos | None = None,
  sequence_length: int = 1024,
  **how: Any,
) -> TextLoss:
  """Returns the loss of the text in files, whose documents follow each other without a token between.

  Args:
    lm: the model, with its tokenizer.
    text: glob of .txt, .jsonl[.gz|.zst] or .parquet files, or `pydoc:topics`, as `data.text.find_files` takes it.
    text_key: the key of a JSON line, or the column of a parquet file, that holds the text.
    max_tokens: number of tokens to read, from the start of the text; 0 means all.
    bos: as `text_loss` takes it. None: "text" if the tokenizer puts a begin-of-text token before texts, else "never".
    sequence_length: tokens of a window, see `text_loss`.
    **how: further arguments of `text_loss`.

  Raises:
    FileNotFoundError: no file matches.
    NotFiniteError: as `text_loss`.
    ValueError: as `text_loss`; `max_tokens` is less than one window, a file cannot be read, or the model has no
      tokenizer.
  """
  if lm.tokenizer is None:
    raise ValueError("This checkpoint has no tokenizer to read text with: use perplexity.text_loss with token ids.")
  if 0 < max_tokens < sequence_length:
    raise ValueError(f"max_tokens={max_tokens} does not fill one piece: sequence_length={sequence_length}.")
  documents = (lm.tokenizer.encode(document, bos=False) for document in read_documents(text, text_key))
  tokens = list(itertools.islice(itertools.chain.from_iterable(documents), max_tokens or None))
  bos = bos or ("text" if lm.tokenizer.begins_texts else "never")
  return text_loss(lm, tokens, sequence_length=sequence_length, bos=bos, **how)


def text_loss(
  lm: LM,
  tokens: Sequence[int],
  *,
  sequence_length: int = 1024,
  stride: int | None = None,
  bos: Bos = "never",
  batch_size: int = 0,
  progress: bool = False,
) -> TextLoss:
  """Returns the loss of each token of a text that the model reads in windows, each from a fresh state.

  A window begins `stride` tokens after the one before it, and a token is scored in the first window that holds it, as
  in the perplexity guide of the library transformers. So tokens behind the first window are scored with at least
  `sequence_length - stride` tokens of context. The first token that the model reads in a window is never scored there.
  If `stride` is the window's length, an incomplete last window is left out; else it is read.

  Args:
    lm: the model.
    tokens: token ids of the text.
    sequence_length: tokens of a window, at least 2. 0: the whole text is read once, and the state carried on; of an RNN
      the state stays as large as it is.
    stride: tokens from the beginning of a window to that of the next; None: a window's length, so that windows do not
      overlap. A short stride gives a lower loss, and reads `sequence_length / stride` times as many tokens.
    bos: where the model reads a begin-of-text token, which is never scored. "text": once, before the first token of
      the text, if the text has none, as most published figures have it. "windows": before each window, which then
      holds a token less of the text.
    batch_size: number of windows that the model reads at a time; None: as many as hold BATCH_TOKENS. It changes the
      results by rounding only.
    progress: whether to show progress on stderr.

  Raises:
    NotFiniteError: logits are not finite; the message names the first token after which they are not.
    ValueError: the text does not fill one window, an argument is out of range, or the model has no begin-of-text token.
  """
  if bos not in get_args(Bos):
    raise ValueError(f"bos={bos!r}: wanted one of {', '.join(get_args(Bos))}.")
  if sequence_length != 0 and sequence_length < 2:
    raise ValueError(f"sequence_length={sequence_length}: wanted at least 2, the first of which is no target, or 0.")
  if batch_size < 0:
    raise ValueError(f"batch_size={batch_size}: wanted at least 1, or 0.")
  ids = np.asarray(tokens, np.int32)
  lead = np.zeros(0, np.int32) if bos == "never" else np.asarray([_bos_id(lm)], np.int32)
  if lead.size and not (sequence_length and bos == "windows"):
    ids = ids if ids[:1].tolist() == lead.tolist() else np.concatenate([lead, ids])
    lead = lead[:0]
  length = (sequence_length or max(ids.size, 2)) - lead.size
  if ids.size < length:
    raise ValueError(f"The text has {ids.size} tokens, fewer than one piece of {length}.")
  step = length if stride is None else stride
  if not 1 <= step <= length or (stride and not sequence_length):
    wanted = f"1 to {length}, the tokens of the text in a window" if sequence_length else "None, without windows"
    raise ValueError(f"stride={stride}: wanted {wanted}.")
  windows = cut(ids.size, length, step, first=1 - lead.size)
  if sequence_length:
    rows = min(batch_size or max(BATCH_TOKENS // sequence_length, 1), len(windows))
    scored = _in_windows(lm, ids, windows, lead, length, rows)
  else:
    scored = _in_pieces(lm, ids)

  total, done = sum(end - first for _, first, end in windows), 0.0
  parts: list[tuple[np.ndarray, ...]] = []
  with Progress(total, "{done}/{total} tokens", {"loss": "loss {:.4f}".format}, enabled=progress) as shown:
    for part in scored:
      parts.append(part)
      done += float(part[0].sum(dtype=np.float64))
      count = shown.done + part[0].size
      shown.advance_to(count, loss=done / count)
  nll, position, window = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
  begins = np.asarray([begin for begin, _, _ in windows])
  return TextLoss(nll, position, window, begins, sequence_length, step if sequence_length else 0, bos)


def _bos_id(lm: LM) -> int:
  bos = lm.config.bos_token_id if lm.tokenizer is None else lm.tokenizer.bos_id
  if bos is None:
    raise ValueError("This model has no token that begins a text: use bos='never'.")
  return bos


def cut(count: int, length: int, stride: int, *, first: int = 1) -> list[tuple[int, int, int]]:
  """Cuts a text into windows; returns (index of its first token, of its first scored token, of its end) for each.

  Args:
    count: number of tokens of the text.
    length: tokens of a window. An incomplete last window is left out if `stride` is `length`.
    stride: tokens from the beginning of a window to that of the next.
    first: number of a window's first tokens that cannot be scored, since nothing is read before them.
  """
  windows: list[tuple[int, int, int]] = []
  done = 0
  for begin in range(0, count, stride):
    end = min(begin + length, count)
    if stride == length > end - begin:
      break
    windows.append((begin, max(done, begin + first), end))
    done = end
    if end == count:
      break
  return windows


def _in_windows(
  lm: LM, ids: np.ndarray, windows: Sequence[tuple[int, int, int]], lead: np.ndarray, length: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (nll, position, window) of the tokens that are scored in each window; `rows` windows are read at a time."""
  width = lead.size + length
  for start in range(0, len(windows), rows):
    # One shape for all batches. Padding is on the right, and what follows a token does not change its loss.
    batch = np.zeros((rows, width), np.int32)
    batch[:, : lead.size] = lead
    for row, (begin, _, end) in enumerate(windows[start : start + rows]):
      batch[row, lead.size : lead.size + end - begin] = ids[begin:end]
    with on_mesh(lm.mesh):
      nll = np.asarray(token_nll(lm.model, lm.params, batch)[0])
    for row, (begin, first, end) in enumerate(windows[start : start + rows]):
      position = np.arange(first, end, dtype=np.int32) - begin + lead.size
      own = nll[row, position - 1]
      if not np.isfinite(own).all():
        window = batch[row, : lead.size + end - begin].tolist()
        raise not_finite(lm.model, lm.params, [window], before=begin - lead.size)
      yield own, position, np.full(own.size, start + row, np.int32)


def _in_pieces(lm: LM, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (nll, position, window) of the tokens of each piece of a text that is read once."""
  width = min(PIECE_TOKENS, ids.size - 1)
  state: Any = placed(lm.model.init_state(1, capacity_for(ids.size + width)), lm.config, lm.mesh)
  for begin in range(0, ids.size - 1, width):
    piece = ids[begin : begin + width + 1]
    batch = np.pad(piece, (0, width + 1 - piece.size))[None]
    with on_mesh(lm.mesh):
      nll, state = token_nll(lm.model, lm.params, batch, state)
    own = np.asarray(nll)[0, : piece.size - 1]
    if not np.isfinite(own).all():
      raise not_finite(lm.model, lm.params, [ids[: begin + piece.size].tolist()])
    yield own, np.arange(begin + 1, begin + piece.size, dtype=np.int32), np.zeros(own.size, np.int32)
