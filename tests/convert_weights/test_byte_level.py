"""Byte-level BPE: ids as transformers' own classes, and a plain BPE over the patterns of real files, give them."""

import itertools
import json
from pydoc_data.topics import topics

import pytest
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from convert_weights.byte_level import KINDS, byte_level_bpe, ranked_bpe
from convert_weights.errors import ConversionError

TEXTS = [
  *(
    "Hello, world!",
    "  two  spaces ",
    "a\r\n\n b\n\t\tc",
    "I'M you'RE we'll 'S it'\u017f don\u2019t",
    "12345.678 ٣٤٥ ½",
    "\ufeff\x00\x7f",
  ),
  *(
    "日本語のテキスト 한국어",
    "Zu\u0308rich café",
    "🤖👩‍👩‍👧 ",
    "हिन्दी العربية ไทย",
    "XMLHttpRequest ÀÉs/x//\n/y",
    "a" * 40,
    " " * 33,
  ),
  *(
    "\u00a0\u3000x",
    "_a__b---\n\n\n   \n",
    "Ǆǅǆ \U0001d49c\U0001d4c1",
    "if (x) {\n    return 1;\n}\n",
    "<|end|>",
    "1999 2024 2024 1999 100/100 XYs",
  ),
  *(topics[name][:2000] for name in sorted(topics)[:5]),
]
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
# As the tokenizer.json of Llama 3.1 and Qwen3 and tekken.json spell them.
LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": LLAMA_3, "smaug-bpe": LLAMA_3, "tekken": TEKKEN, "smollm": GPT_2}


@pytest.fixture(scope="module")
def trained():
  """(vocabulary, merges); its tokens have spaces, digits and punctuation on either side, as no kind's words have."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, max_token_length=9)
  tokenizer.train_from_iterator([line for text in TEXTS for line in text.splitlines(keepends=True)], trainer)
  return tokenizer.get_vocab(), [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def encode(text, kind, vocab, merges, ignore_merges):
  """Byte-level BPE as its authors describe it, slowly."""
  rank = {pair: i for i, pair in enumerate(merges)}
  segments = regex.split(r"(\p{N})", text) if kind == "smollm" else [text]
  ids = []
  for word in itertools.chain.from_iterable(regex.findall(PATTERNS[kind], segment) for segment in segments):
    parts = [character for byte in word.encode() for character in ALPHABET[byte]]
    if ignore_merges and "".join(parts) in vocab:
      parts = ["".join(parts)]
    while pairs := [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank]:
      _, i = min(pairs)
      parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids += [vocab[part] for part in parts]
  return ids


@pytest.mark.parametrize("kind", PATTERNS)
def test_ids_of_a_plain_bpe(trained, kind):
  vocab, merges = trained
  tokenizer = byte_level_bpe(vocab, merges, kind)
  for text in TEXTS:
    ids = tokenizer.encode(text).ids
    assert ids == encode(text, kind, vocab, merges, KINDS[kind].ignore_merges), text
    assert tokenizer.decode(ids) == text


def test_kinds_differ(trained):
  """So that a name that stood for another kind would be noticed."""
  kinds = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
  found = {kind: [byte_level_bpe(*trained, kind).encode(text).ids for text in TEXTS] for kind in kinds}
  assert all(found[a] != found[b] for a, b in itertools.combinations(kinds, 2))


@pytest.mark.parametrize("kind, name", [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_ids_of_transformers(trained, kind, name):
  transformers = pytest.importorskip("transformers")
  theirs = getattr(transformers, name)(vocab=trained[0], merges=trained[1], unk_token=None)
  ours = byte_level_bpe(*trained, kind)
  for text in TEXTS:
    assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], text


def test_words_that_no_merge_leads_to(trained):
  vocab, merges = {**trained[0], "Hqz": 900}, trained[1]
  whole, parts = (byte_level_bpe(vocab, merges, "llama-bpe", ignore_merges=i).encode("Hqz").ids for i in (None, False))
  assert whole == [900] and parts == [vocab[c] for c in "Hqz"]


@pytest.mark.parametrize("kind", ["llama-bpe", "tekken"])
def test_ranks_alone(trained, kind):
  """Merges are found again from the order of the tokens; those of tekken.json stand behind special tokens."""
  vocab, merges = trained
  characters = {character: byte for byte, character in ALPHABET.items()}
  ranks = [bytes(characters[c] for c in token) for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
  tokenizer = ranked_bpe(ranks, kind, first_id=2, special={"<s>": 0, "</s>": 1})
  for text in TEXTS:
    assert tokenizer.encode(text).ids == [i + 2 for i in encode(text, kind, vocab, merges, True)], text
  assert tokenizer.encode("a<s>b").ids == [2 + vocab["a"], 0, 2 + vocab["b"]]


def test_refused(trained):
  vocab, merges = trained
  with pytest.raises(ConversionError, match=r"'default' is not supported: only gpt-2, smollm, .*tekken"):
    byte_level_bpe(vocab, merges, "default")
  with pytest.raises(ConversionError, match="the merge 'a nowhere' names tokens"):
    byte_level_bpe(vocab, [("a", "nowhere")], "gpt-2")
  with pytest.raises(ConversionError, match="1 tokens are listed twice"):
    ranked_bpe([b"a", b"a"], "tekken")
  with pytest.raises(ConversionError, match=r"ids of other tokens \(\[0\]\)"):
    ranked_bpe([b"a"], "tekken", special={"<s>": 0})
