"""A SentencePiece vocabulary -> a tokenizer of the `tokenizers` package that gives the same ids."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# Types of pieces, numbered as in SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "▁"  # how SentencePiece writes a space


def sentencepiece_bpe(
  pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, dummy_prefix: bool, legacy: bool
) -> Tokenizer:
  """Builds the tokenizer of a SentencePiece BPE vocabulary that does not normalise texts.

  SentencePiece merges the pair of neighbouring pieces whose concatenation has the highest score. That is BPE with a
  list of merges in descending order of score.

  Args:
    pieces, scores, types: piece, score and type (NORMAL to BYTE) of each id. Control and unknown pieces become special
      tokens.
    dummy_prefix: whether a space is put before every text.
    legacy: whether, with `dummy_prefix`, a space is also put after every special token, as transformers does if
      `legacy` is true.
  """
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  normal = {piece: i for piece, i in vocabulary.items() if types[i] == NORMAL}
  own = [piece for piece, i in vocabulary.items() if types[i] == USER_DEFINED]
  ranked = [
    (-scores[i], i, piece[:cut], piece[cut:])
    for piece, i in normal.items()
    for cut in range(1, len(piece))
    if piece[:cut] in normal and piece[cut:] in normal
  ]
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=[(left, right) for _, _, left, right in sorted(ranked)],
      unk_token=next((piece for piece, i in vocabulary.items() if types[i] == UNKNOWN), None),
      fuse_unk=True,
      byte_fallback=BYTE in types,
      # User-defined pieces have no merges: SentencePiece never splits them.
      ignore_merges=bool(own),
    )
  )
  # A normaliser runs on each stretch of text between special tokens; a pre-tokeniser knows which stretch is the first.
  steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
  splits: list[pre_tokenizers.PreTokenizer] = []
  if dummy_prefix and legacy:
    steps.insert(0, normalizers.Prepend(_SPACE))
  elif dummy_prefix:
    # Metaspace adds no prefix to a text that begins with its replacement. Spaces are ▁ by now, so no text begins with
    # " " and the first Metaspace always adds its prefix, which the second turns into ▁.
    splits += [_metaspace(" ", "first"), _metaspace(_SPACE, "never")]
  if own:
    splits.append(pre_tokenizers.Split(Regex("|".join(map(_escaped, sorted(own, key=len, reverse=True)))), "isolated"))
  tokenizer.normalizer = normalizers.Sequence(steps)
  if splits:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
  strip = [decoders.Strip(content=" ", left=1)] if dummy_prefix else []
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  tokenizer.add_special_tokens(
    [
      AddedToken(piece, special=True, normalized=False)
      for piece, kind in zip(pieces, types, strict=True)
      if kind in (CONTROL, UNKNOWN)
    ]
  )
  return tokenizer


def _metaspace(replacement: str, prepend: str) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Metaspace(replacement=replacement, prepend_scheme=prepend, split=False)


def _escaped(text: str) -> str:
  """Returns a regular expression, for Oniguruma, that matches only this text."""
  return "".join(f"\\x{{{ord(character):x}}}" for character in text)
