"""Tokenizers in GGUF files: ids are those of SentencePiece itself, and of transformers' own classes."""

import functools
import io
import json
from pydoc_data.topics import topics

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from convert_weights.errors import ConversionError
from convert_weights.gguf_file import open_gguf
from convert_weights.gguf_tokenizer import tokenizer_files
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import layers

PROSE = "\n".join(topics[name] for name in sorted(topics))[:60_000].splitlines()
TEXTS = [
  *(
    "Hello, world! 7.5",
    " leading",
    "  two  spaces  ",
    "\n\n\t x\n",
    "naïve Zürich e\u0301",
    "日本語 🤖👩‍👩‍👧 हिन्दी",
    "\x00\x7f\u00a0▁x",
  ),
  *("if (x) {\n    return 1;\n}\n", "don't WE'LL", "<0x0A>", ""),
  *("\n".join(PROSE[i : i + 30]) for i in range(0, 120, 30)),
]
CONFIG = ModelConfig(
  vocab_size=1000, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=8,
  layers=layers(("softmax",)), norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,), max_positions=64,
)  # fmt: skip


def files_of(path, model, tokens, types, *, pre="default", scores=None, merges=None, **flags):
  """What becomes of a GGUF file without tensors, as llama.cpp's converter writes its tokenizer."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  if scores is not None:
    writer.add_token_scores(scores)
  if merges is not None:
    writer.add_token_merges([" ".join(pair) for pair in merges])
  for name, value in ({"bos_token_id": 1, "eos_token_id": 2} | flags).items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return tokenizer_files(open_gguf(path).metadata, CONFIG, str(path))


@pytest.fixture
def sentences():
  return trained()


@functools.cache
def trained(prefix=True):
  """A SentencePiece model as Llama 2's and Mistral's are, which put a space before a text."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(PROSE), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, num_threads=1,
    allow_whitespace_only_pieces=True, add_dummy_prefix=prefix, minloglevel=2,
  )  # fmt: skip
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def llama(path, model, added=(), **flags):
  ids = range(model.get_piece_size())
  kinds = [(2, model.is_unknown), (3, model.is_control), (6, model.is_byte)]
  types = [next((kind for kind, holds in kinds if holds(i)), 1) for i in ids] + [4] * len(added)
  scores = [model.get_score(i) for i in ids] + [-1000.0] * len(added)
  return files_of(path, "llama", [*map(model.id_to_piece, ids), *added], types, scores=scores, **flags)


def test_ids_of_sentencepiece(tmp_path, sentences):
  files = llama(tmp_path / "m.gguf", sentences)
  tokenizer = Tokenizer.from_files(files, CONFIG)
  for text in TEXTS:
    assert tokenizer.encode(text, bos=False) == sentences.encode(text), text
    assert tokenizer.encode(text, bos=True) == [1, *sentences.encode(text)]
    assert tokenizer.decode(sentences.encode(text)) == text.replace("▁", " ")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
  )
  assert theirs(TEXTS)["input_ids"] == [[1, *sentences.encode(text)] for text in TEXTS]
  settings = json.loads(files["tokenizer_config.json"])
  assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>") and settings["model_max_length"] == 64


def test_sentencepiece_between_special_and_added_tokens(tmp_path, sentences):
  """As in llama.cpp and Llama 2's own tokenizer.json a space goes before each stretch of text."""
  tokenizer = Tokenizer.from_files(llama(tmp_path / "m.gguf", sentences, added=("<|im_start|>", "a b")), CONFIG)
  start, own = sentences.get_piece_size(), sentences.get_piece_size() + 1
  got = tokenizer.encode("a</s>b<|im_start|>user\na bc<unk>", bos=False)
  word = sentences.encode
  assert got == [*word("a"), 2, *word("b"), start, *word("user\n"), own, *word("c"), 0]
  assert tokenizer.decode([start], keep_special=False) == "<|im_start|>"


@pytest.mark.parametrize("prefix", [True, False])
def test_flags_of_sentencepiece(tmp_path, prefix):
  model = trained(prefix)
  files = llama(tmp_path / "m.gguf", model, add_space_prefix=prefix, add_bos_token=False, add_eos_token=True)
  whole = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
  for text in TEXTS:
    assert whole.encode(text).ids == [*model.encode(text), 2], text


@pytest.fixture(scope="module")
def words():
  """(tokens, types, merges) of a byte-level BPE with special tokens, one that was added, and one for padding."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  special = ["<|begin|>", "<s>", "</s>", "<think>"]
  trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
  backend.train_from_iterator(PROSE, trainer)
  tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
  merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
  return [*tokens, "[PAD600]"], [3, 3, 3, 4, *[1] * (len(tokens) - 4), 5], merges


@pytest.mark.parametrize("pre, name", [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_ids_of_transformers(tmp_path, words, pre, name):
  tokens, types, merges = words
  files = files_of(tmp_path / "m.gguf", "gpt2", tokens, types, pre=pre, merges=merges)
  ours = Tokenizer.from_files(files, CONFIG)
  transformers = pytest.importorskip("transformers")
  theirs = getattr(transformers, name)(
    vocab={token: i for i, token in enumerate(tokens)}, merges=merges, bos_token="<|begin|>", eos_token="</s>",
    unk_token="<s>", extra_special_tokens=["<think>"],
  )  # fmt: skip
  for text in (*TEXTS, "a</s>b<think>c", "<|begin|>x"):
    assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"], text
  assert ours.decode([2, 3], keep_special=False) == "<think>"


@pytest.mark.parametrize("pre, adds", [("llama-bpe", True), ("tekken", True), ("smaug-bpe", False), ("qwen2", False)])
def test_bos_where_the_file_does_not_say(tmp_path, words, pre, adds):
  """As llama.cpp has it; what the file says comes first."""
  for flags, wanted in (({}, adds), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)):
    files = files_of(tmp_path / "m.gguf", "gpt2", *words[:2], pre=pre, merges=words[2], **flags)
    ids = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]).encode("a").ids
    assert ids[:-1] == [1] * wanted, flags


def test_refused(tmp_path, sentences, words):
  tokens, types, merges = words

  def refuse(fragment, model="gpt2", types=types, pre="gpt-2", merges=merges, tokens=tokens, **other):
    with pytest.raises(ConversionError, match=fragment) as caught:
      files_of(tmp_path / "m.gguf", model, tokens, types, pre=pre, merges=merges, **other)
    assert str(tmp_path / "m.gguf") in str(caught.value) and "--tokenizer=DIR" in str(caught.value)

  refuse(r"token types \[6\] are not supported", types=[6, *types[1:]])
  refuse("600 token types", types=types[1:], tokens=tokens)
  refuse("add_space_prefix=True is not supported", add_space_prefix=True)
  refuse("add_eos_token is true, but tokenizer.ggml.eos_token_id is missing", add_eos_token=True, eos_token_id=7000)
  refuse("all are -1000.0, which says nothing about the order of merges", model="llama", scores=[-1000.0] * len(tokens))
  refuse("601 tokens but 2 scores", model="llama", scores=[0.0, 0.0])
  refuse(
    "remove_extra_whitespaces", model="llama", scores=[-float(i) for i in range(601)], remove_extra_whitespaces=True
  )
