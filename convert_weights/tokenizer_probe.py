"""A thousand hard texts. Two tokenizers that give the same ids for all of them are treated as equal."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

NUM_TEXTS = 1000
# Ranges of code points, (first, last + 1): Latin, Greek and Cyrillic, Hebrew and Arabic, Indic, Thai, punctuation,
# kana, Han, Hangul, private use, controls, letters outside the basic plane, emoji.
_SCRIPTS = (
  (0x21, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xD80), (0xE00, 0xE80),
  (0x1E00, 0x2000), (0x2000, 0x2070), (0x2190, 0x2600), (0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00),
  (0xE000, 0xE010), (0xFF00, 0xFFEF), (0x0, 0x20), (0x7F, 0xA0), (0x1D400, 0x1D500), (0x1F300, 0x1F650),
)  # fmt: skip
_BLANKS = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "▁", "\u00a0", "\u200b", "\u3000", " \n ", "    \n\n  ")
_ODD = (
  "7. Seventh\n\n\n8. Eighth 1,234,567 3.14159 0x1F ½ ² ١٢٣",
  "it's I'LL we've 'tis O'Neill\u2019s don\u2019T",
  "def f(x):\n    return {'a': [x ** 2, -x]}\n\tif x != None and __name__ == '__main__':   # blanks   ",
  "HELLOWorld helloWORLD camelCase snake_case kebab-case ÀÉÎ ﬁne ﬀ Å Å é é İı ß",
  "<0x41> <0xff> <unk> < s> ▁▁ ## Ġ Ċ",
  "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 a\u0301\u0323 \ufeff\ufffd\uffff",
)


@functools.cache
def hard_texts() -> tuple[str, ...]:
  """Returns NUM_TEXTS texts, always the same: scripts of all kinds, blanks, controls, pieces of English and of code."""
  draw = random.Random(0)
  prose = "\n".join(topics[name] for name in sorted(topics)[:40])
  texts = ["", *_BLANKS, *_ODD]
  while len(texts) < NUM_TEXTS:
    first, last = draw.choice(_SCRIPTS)
    parts: list[str] = []
    for _ in range(draw.randrange(1, 9)):
      kind = draw.random()
      if kind < 0.4:
        parts.append("".join(chr(draw.randrange(first, last)) for _ in range(draw.randrange(1, 7))))
      elif kind < 0.55:
        parts.append(chr(draw.randrange(*draw.choice(_SCRIPTS))))
      elif kind < 0.75:
        parts.append(draw.choice(_BLANKS))
      else:
        start = draw.randrange(len(prose) - 40)
        parts.append(prose[start : start + draw.randrange(1, 40)])
    texts.append("".join(parts))
  return tuple(texts)


def first_difference(
  one: Callable[[str], Sequence[int]], other: Callable[[str], Sequence[int]], special: Sequence[str] = ()
) -> str | None:
  """Returns the first hard text that two tokenizers encode differently; None if they encode all hard texts alike.

  Args:
    one, other: encode functions, text -> ids.
    special: special tokens. For each, four texts are added that have the token between words or spaces, once or several
      times; none of these texts begins with the token.
  """
  marked = [
    text
    for token in special
    for text in (f"hi{token}", f"a {token} b", f"a{token}  b{token}{token}c", f" {token}\n{token} ")
  ]
  return next((text for text in (*hard_texts(), *marked) if list(one(text)) != list(other(text))), None)
