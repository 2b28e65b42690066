"""Plants facts in filler text, each at an exact distance from the question about it.

There are four kinds of facts, after passkeys (Mohtashami and Jaggi 2023), RULER (Hsieh et al. 2024) and associative
recall (Arora et al. 2023):

  repeat     random strings of tokens; the question is the first half of one string, the answer its second half.
  passkey    one sentence that states a number.
  pairs      a list of names, each with its number.
  multi_key  the sentences of a passkey, one for each of several names, scattered over the filler.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

Encode = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Format:
  """The wording of a fact; `{key}` stands for its name.

  Attributes:
    begins: text before the number.
    ends: text after the number.
    asks: the question, which the number follows.
  """

  begins: str
  ends: str
  asks: str


SPLITS = ("train", "test")
# Kind -> (wording of the training texts, wording of the test texts).
FORMATS = {
  "passkey": (
    Format("\nThe number to remember is", ". Remember it.\n", "\nThe number to remember was"),
    Format("\nThe pass key is", ". Do not forget the pass key.\n", "\nWhat is the pass key? The pass key is"),
  ),
  "pairs": (Format("\n{key} ->", ";", "\n{key} ->"), Format("\n{key}:", "", "\n{key}:")),
  "multi_key": (
    Format("\nThe code of the {key} is", ".\n", "\nWhich code has the {key}? Its code is"),
    Format("\nThe magic number for {key} is", ".\n", "\nThe magic number for {key} mentioned above is"),
  ),
}
KEYS = (
  "anchor basket candle dragon engine feather garden hammer island jacket kettle ladder mirror needle orange pencil",
  "apple bridge castle desert forest guitar harbor insect jungle kitchen lemon market notebook ocean piano rocket",
)
STRINGS = ((3, 2), (4, 4))  # (tokens of the question, tokens of the answer) of a random string
KINDS = ("repeat", *FORMATS)


@dataclasses.dataclass(frozen=True)
class Planted:
  """A text that ends in a question, and the answers to choose from.

  Attributes:
    context: int32 [T], the token ids of the text; the answer would follow.
    candidates: int32 [C, m], the token ids of the answers to choose from. The first ones are those of the other facts.
    right: row of the right answer in `candidates`.
    where: index in `context` of the first token of the right answer. The distance is T - `where`: a token that may be
      looked up is that far from the token that is predicted.
  """

  context: np.ndarray
  candidates: np.ndarray
  right: int
  where: int

  @property
  def answer(self) -> np.ndarray:
    """Token ids of the right answer, int32 [m]."""
    return self.candidates[self.right]

  @property
  def text(self) -> np.ndarray:
    """Token ids of the text and its right answer, int32 [T + m], to train on."""
    return np.concatenate([self.context, self.answer])


def plant(
  kind: str,
  distance: int,
  filler: Sequence[int] | np.ndarray,
  *,
  count: int,
  seed: int = 0,
  split: str = "test",
  encode: Encode | None = None,
  alphabet: Sequence[int] | np.ndarray | None = None,
  before: int = 128,
  facts: int = 6,
  candidates: int = 16,
) -> list[Planted]:
  """Makes texts in which a fact has to be looked up, each of exactly `before` + `distance` tokens.

  Args:
    kind: one of KINDS.
    distance: number of tokens from the fact's answer to the place where it is asked for.
    filler: token ids of real text; each planted text takes a part of it that begins at a random token.
    count: number of texts.
    seed: determines everything that is random.
    split: "train" or "test"; the two differ in wording and names, and random strings in length and in their tokens.
    encode: encodes a text that continues another one, as `functools.partial(tokenizer.encode, continues=True)` does;
      all kinds but `repeat` need it.
    alphabet: token ids that random strings are made of; None: every second id of those in `filler`.
    before: index of the answer's first token in a text. The text before it has room for half of the other facts.
    facts: number of facts of a text; a passkey is always alone.
    candidates: number of answers to choose from: those of all facts, and as many random ones as are missing.

  Raises:
    ValueError: the kind or split is unknown, there is no `encode`, the facts do not fit, or there are too few tokens,
      names or candidates.
  """
  if kind not in KINDS or split not in SPLITS:
    raise ValueError(f"kind={kind!r}, split={split!r}: wanted one of {', '.join(KINDS)}; and train or test.")
  filler = np.asarray(filler, np.int32)
  facts = 1 if kind == "passkey" else facts
  if not len(filler) or not 1 <= facts <= candidates or candidates < 2:
    raise ValueError(f"{len(filler)} tokens of filler, {facts} facts, {candidates} candidates: wanted 1, 1 and 2 more.")
  number = SPLITS.index(split)
  if kind == "repeat":
    letters = np.unique(filler)[number::2] if alphabet is None else np.asarray(alphabet, np.int32)
    write: Write = functools.partial(_strings, letters, *STRINGS[number])
  elif encode is None:
    raise ValueError(f"kind={kind!r} is text: wanted `encode`, which makes tokens of it.")
  else:
    write = functools.partial(_sentences, encode, FORMATS[kind][number], KEYS[number].split())
  rng = np.random.default_rng([seed, KINDS.index(kind), number, distance])
  return [_planted(write, distance, filler, rng, before, facts, candidates, kind == "pairs") for _ in range(count)]


def plant_repeats(
  rows_BT: np.ndarray, segment_ids_BT: np.ndarray | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Writes random strings over parts of rows of text, each at two places: a string for every 64 tokens.

  Args:
    rows_BT: int [B, T], token ids of text.
    segment_ids_BT: the document of each token.
    seed: determines everything that is random.

  Returns:
    (the rows, bool [B, T]: which tokens only who looks them up knows, answers of the strings at their second places;
    none where the two places are not in one document).
  """
  split = SPLITS.index("train")
  asked, answered = STRINGS[split]
  length = asked + answered
  rng = np.random.default_rng(seed)
  rows_BT = rows_BT.copy()
  known_BT = np.zeros(rows_BT.shape, bool)
  for number, row in enumerate(rows_BT):
    letters, strings = np.unique(row)[split::2], len(row) // 64
    places = rng.permutation(len(row) // length)[: 2 * strings].reshape(strings, 2) * length
    for first, second in np.sort(places).tolist():
      row[first : first + length] = row[second : second + length] = rng.choice(letters, length)
      together = segment_ids_BT is None or segment_ids_BT[number, first] == segment_ids_BT[number, second + length - 1]
      known_BT[number, second + asked : second + length] = together
  return rows_BT, known_BT


@dataclasses.dataclass(frozen=True)
class _Fact:
  """Token ids of a fact: what begins it, its answer, what ends it, and the question about it."""

  begins: np.ndarray
  answer: np.ndarray
  ends: np.ndarray
  asks: np.ndarray

  @property
  def tokens(self) -> np.ndarray:
    return np.concatenate([self.begins, self.answer, self.ends])


Write = Callable[[np.random.Generator, int, int], tuple[list[_Fact], np.ndarray]]


def _strings(alphabet, asked, answered, rng, facts, others) -> tuple[list[_Fact], np.ndarray]:
  """Returns (facts, other answers) of random strings; no token is twice in the strings of a text."""
  length = asked + answered
  if len(alphabet) < facts * length:
    raise ValueError(f"{len(alphabet)} different tokens: wanted {facts * length} for {facts} strings.")
  strings = rng.choice(alphabet, (facts, length), replace=False).astype(np.int32)
  nothing = np.zeros(0, np.int32)
  made = [_Fact(string[:asked], string[asked:], nothing, string[:asked]) for string in strings]
  return made, rng.choice(alphabet, (others, answered)).astype(np.int32)


def _sentences(encode, wording, keys, rng, facts, others) -> tuple[list[_Fact], np.ndarray]:
  """Returns (facts, other answers) of sentences about names; the answers are numbers of equally many tokens."""
  if len(keys) < facts:
    raise ValueError(f"{facts} facts, and {len(keys)} names: wanted no more facts than names.")
  answers: list[Sequence[int]] = []
  for drawn in rng.permutation(np.arange(10_000, 100_000))[: 100 * (facts + others)]:
    ids = encode(f" {drawn}")
    if not answers or len(ids) == len(answers[0]):
      answers.append(ids)
    if len(answers) == facts + others:
      break
  else:
    raise ValueError(f"The tokenizer has too few numbers of {len(answers[0])} tokens: wanted {facts + others}.")
  made = []
  for key, answer in zip(rng.permutation(keys)[:facts], answers, strict=False):
    begins, ends, asks = (encode(text.format(key=key)) for text in (wording.begins, wording.ends, wording.asks))
    made.append(_Fact(*(np.asarray(ids, np.int32) for ids in (begins, answer, ends, asks))))
  return made, np.asarray(answers[facts:], np.int32).reshape(others, len(answers[0]))


def _planted(
  write: Write, distance: int, filler: np.ndarray, rng: np.random.Generator, before: int, facts: int, count: int,
  in_a_list: bool,
) -> Planted:  # fmt: skip
  made, others = write(rng, facts, count - facts)
  right, half = int(rng.integers(facts)), (facts - 1) // 2
  asked = made[right]
  rest = [fact.tokens for number, fact in enumerate(made) if number != right]
  after = distance - len(asked.answer) - len(asked.ends) - len(asked.asks)
  filler = np.take(filler, int(rng.integers(len(filler))) + np.arange(before + distance), mode="wrap")
  left = _spread(rest[:half], filler[:before], before - len(asked.begins), rng, "end" if in_a_list else "")
  follow = _spread(rest[half:], filler[before:], after, rng, "start" if in_a_list else "")
  context = np.concatenate([left, asked.tokens, follow, asked.asks]).astype(np.int32)
  return Planted(context, np.concatenate([[fact.answer for fact in made], others]), right, before)


def _spread(
  parts: Sequence[np.ndarray], filler: np.ndarray, length: int, rng: np.random.Generator, at: str
) -> np.ndarray:
  """Returns `length` tokens: the parts at the start or the end of filler, or scattered over it for an empty `at`."""
  room = length - sum(map(len, parts))
  if room < 0:
    raise ValueError(f"{len(parts)} facts of {sum(map(len, parts))} tokens do not fit into {length}: wanted more room.")
  cuts = {"start": np.zeros(len(parts), int), "end": np.full(len(parts), room)}
  at_tokens = cuts.get(at, np.sort(rng.integers(0, room + 1, len(parts))))
  gaps = np.split(filler[:room], at_tokens)
  pieces = [piece for pair in zip(gaps, [*parts, np.zeros(0, np.int32)], strict=True) for piece in pair]
  return np.concatenate(pieces)
