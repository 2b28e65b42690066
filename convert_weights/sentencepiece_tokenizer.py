"""A SentencePiece vocabulary -> a tokenizer of the `tokenizers` package that gives the same ids."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# The types of pieces, numbered as SentencePiece and GGUF do.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "▁"  # how SentencePiece writes a space


def sentencepiece_bpe(
  pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, dummy_prefix: bool, legacy: bool
) -> Tokenizer:
  """A BPE vocabulary of SentencePiece, without normalisation of its own.

  SentencePiece merges the neighbours whose union has the highest score, which is a list of merges in order of score.

  Args:
    pieces, scores, types: of each id; the types are those above. Control and unknown pieces become special tokens.
    dummy_prefix: a space is put before every text.
    legacy: and after every special token, as transformers does where `legacy` is true.
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
  model = models.BPE(
    vocab=vocabulary,
    merges=[(left, right) for _, _, left, right in sorted(ranked)],
    unk_token=next((piece for piece, i in vocabulary.items() if types[i] == UNKNOWN), None),
    fuse_unk=True,
    byte_fallback=BYTE in types,
    # Pieces of the user's own have no merges: SentencePiece takes them whole.
    ignore_merges=bool(own),
  )
  return _tokenizer(model, pieces, types, own, dummy_prefix=dummy_prefix, legacy=legacy)


def sentencepiece_unigram(
  pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, dummy_prefix: bool, legacy: bool
) -> Tokenizer:
  """A unigram vocabulary of SentencePiece; takes what `sentencepiece_bpe` takes."""
  unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
  model = models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=BYTE in types)
  own = [piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]
  return _tokenizer(model, pieces, types, own, dummy_prefix=dummy_prefix, legacy=legacy)


def _tokenizer(
  model: models.Model, pieces: Sequence[str], types: Sequence[int], own: list[str], *, dummy_prefix: bool, legacy: bool
) -> Tokenizer:
  tokenizer = Tokenizer(model)
  # The normaliser sees each stretch of text between special tokens, a pre-tokeniser knows which of them is the first.
  steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
  splits: list[pre_tokenizers.PreTokenizer] = []
  if dummy_prefix and legacy:
    steps.insert(0, normalizers.Prepend(_SPACE))
  elif dummy_prefix:
    # Metaspace puts no prefix before a text that begins with one. Spaces are ▁ by now, so that none begins with " ".
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
  """A regular expression of Oniguruma that matches the text alone."""
  return "".join(f"\\x{{{ord(character):x}}}" for character in text)
