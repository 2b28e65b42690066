"""Builds byte-level BPE tokenizers, from a vocabulary and merges or from tokens in the order of their ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from convert_weights.errors import ConversionError
from supra_jax.data.tokenizer_backends import BYTE_OF

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a byte-level BPE tokenizer splits a text into words, and words into tokens.

  Attributes:
    pattern: regular expression whose matches are the words; no merge crosses a word's end. None means GPT-2's pattern.
    single_digits: whether each digit becomes a word, before the pattern is applied.
    nfc: whether the text is normalised to Unicode's normal form C first.
    ignore_merges: whether a word that is in the vocabulary becomes one token, even if no merges produce it.
    adds_bos: whether llama.cpp begins a text with BOS if the GGUF file does not say.
  """

  pattern: str | None = None
  single_digits: bool = False
  nfc: bool = False
  ignore_merges: bool = False
  adds_bos: bool = False


_LLAMA_BPE = Kind(_LLAMA_3, ignore_merges=True, adds_bos=True)
_SMOLLM = Kind(single_digits=True)
_QWEN = Kind(_QWEN_2, nfc=True)
# llama.cpp's name (`tokenizer.ggml.pre`) -> kind. Only names for which a model's own tokenizer.json gives the same ids.
KINDS: Mapping[str, Kind] = {
  "gpt-2": Kind(),
  "smollm": _SMOLLM,
  "starcoder": _SMOLLM,
  "refact": _SMOLLM,
  "llama-bpe": _LLAMA_BPE,
  "llama3": _LLAMA_BPE,
  "llama-v3": _LLAMA_BPE,
  "smaug-bpe": Kind(_LLAMA_3),
  "qwen2": _QWEN,
  "deepseek-r1-qwen": _QWEN,
  "tekken": Kind(_TEKKEN, ignore_merges=True, adds_bos=True),
}


def byte_level_bpe(
  vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], kind: str, *, ignore_merges: bool | None = None
) -> tokenizers.Tokenizer:
  """Builds a byte-level BPE tokenizer: normaliser, pre-tokeniser and decoder, no added tokens, no post-processor.

  Args:
    vocab: token in GPT-2's byte alphabet -> id.
    merges: pairs of tokens to merge, in order of priority.
    kind: a name in KINDS.
    ignore_merges: replaces the kind's `ignore_merges`; None keeps the kind's.

  Raises:
    ConversionError: the kind is unknown, or a merge names a token that is not in the vocabulary.
  """
  how = named_kind(kind)
  for left, right in merges:
    if not (left in vocab and right in vocab and left + right in vocab):
      raise ConversionError(f"the merge '{left} {right}' names tokens that are not in the vocabulary.")
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=dict(vocab),
      merges=list(merges),
      ignore_merges=how.ignore_merges if ignore_merges is None else ignore_merges,
    )
  )
  if how.nfc:
    tokenizer.normalizer = normalizers.NFC()
  steps: list[pre_tokenizers.PreTokenizer] = []
  if how.single_digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if how.pattern is not None:
    steps.append(pre_tokenizers.Split(tokenizers.Regex(how.pattern), "isolated"))
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how.pattern is None))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def named_kind(name: object) -> Kind:
  """Returns the kind that has this name in KINDS.

  Raises:
    ConversionError: the name is unknown; the message lists the known names.
  """
  if not isinstance(name, str) or name not in KINDS:
    raise ConversionError(f"the pre-tokenizer {name!r} is not supported: only {', '.join(KINDS)}.")
  return KINDS[name]


def ranked_bpe(
  ranks: Sequence[bytes], kind: str, *, first_id: int = 0, special: Mapping[str, int] | None = None
) -> tokenizers.Tokenizer:
  """Builds a byte-level BPE tokenizer from ranked tokens, the form of tiktoken, tekken.json and Llama 3's vocabulary.

  Args:
    ranks: tokens in the order of rank. Of all neighbouring tokens whose concatenation is a token, the pair whose
      concatenation has the lowest rank is merged first.
    kind: a name in KINDS.
    first_id: id of the token of rank 0; the other ids follow by rank.
    special: special token -> id.

  Raises:
    ConversionError: the kind is unknown, a token is listed twice, or two tokens have the same id or spelling.
  """
  rank_of = {token: rank for rank, token in enumerate(ranks)}
  if len(rank_of) != len(ranks):
    raise ConversionError(f"{len(ranks) - len(rank_of)} tokens are listed twice.")
  vocab = {_spelled(token): first_id + rank for token, rank in rank_of.items()}
  special = special or {}
  taken = sorted(i for i in special.values() if first_id <= i < first_id + len(ranks))
  twice = len(special) - len(set(special.values()))
  spelled_twice = sorted(vocab.keys() & special.keys())
  if taken or twice or spelled_twice:
    raise ConversionError(
      f"special tokens have the ids of other tokens ({taken[:20]}), share ids among themselves ({twice}), or are "
      f"spelled like other tokens ({spelled_twice[:20]})."
    )
  merges = [(_spelled(left), _spelled(right)) for left, right in _merges(rank_of)]
  tokenizer = byte_level_bpe({**special, **vocab}, merges, kind)
  tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
  return tokenizer


_SPELLING = {byte: character for character, byte in BYTE_OF.items()}


def _spelled(token: bytes) -> str:
  return "".join(map(_SPELLING.__getitem__, token))


def _merges(rank_of: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
  """Yields, for each token of several bytes in the order of rank, the pair of tokens whose merge makes this token.

  No merge inside a token depends on the text around the token, so a token's bytes are merged in the same order in every
  text, and the last pair is always the same. For a token that no merges produce, no pair is yielded.
  """
  for token in rank_of:
    pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in rank_of and token[i:] in rank_of]
    if len(pairs) == 1:
      yield pairs[0]
    elif pairs and len(parts := _parts(token, rank_of)) == 2:
      yield parts[0], parts[1]


def _parts(token: bytes, rank_of: Mapping[bytes, int]) -> list[bytes]:
  """Splits a token into the parts that remain after all merges of its bytes that make tokens of lower rank."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 2:
    pairs = [rank_of.get(left + right, len(rank_of)) for left, right in itertools.pairwise(parts)]
    lowest = min(pairs)
    if lowest >= rank_of[token]:
      break
    at = pairs.index(lowest)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return parts
