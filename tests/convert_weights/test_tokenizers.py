"""Tokenizers as people's checkpoints have them: the converted ones give transformers' ids, and so do exports."""

import base64
import dataclasses
import json
import math

import pytest
from tokenizer_kinds import CONFIG, TEXT, exports, sentencepiece_model, write
from tokenizers import AddedToken

from convert_weights import tokenizer_vocabularies
from convert_weights.byte_level import byte_level_bpe
from convert_weights.errors import ConversionError
from convert_weights.tokenizer_export import exported_tokenizer
from convert_weights.tokenizer_probe import NUM_TEXTS, first_difference, hard_texts
from convert_weights.tokenizer_source import tokenizer_files
from supra_jax import LM
from supra_jax.data import tokenizer
from supra_jax.data.tokenizer_backends import BYTE_OF, SentencePieceBackend
from supra_jax.experiments.tiny import byte_bpe
from supra_jax.inference.engine import generate_tokens
from supra_jax.inference.sampling import Sampling
from supra_jax.model.presets import tiny

MARKED = ("<|im_start|>hi<|im_end|> yo", "a <|im_end|>  b", "<s>hi</s> yo", "a</s>b")


@pytest.fixture(scope="module")
def model():
  return sentencepiece_model()


@pytest.fixture(scope="module")
def bpe():
  return json.loads(byte_bpe(TEXT, 512))["model"]


def read(directory):
  return tokenizer.Tokenizer.from_files(tokenizer_files(directory), CONFIG)


def transformers_ids(directory, texts, **how):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(directory, **how)
  return [theirs(text)["input_ids"] for text in texts]


def test_the_probe_is_hard():
  texts = hard_texts()
  assert len(texts) == NUM_TEXTS
  characters = set("".join(texts))
  assert len(characters) > 3000 and {"\x00", "▁", " ", "\u00a0"} <= characters
  assert first_difference(str.encode, lambda text: text.replace("  ", " ").encode()) is not None


@pytest.mark.parametrize("legacy", [None, True, False])
def test_sentencepiece_becomes_tokenizer_json(legacy, tmp_path):
  """The ids are those of the sentencepiece package, which needs no tokenizer.json to give them."""
  contents = sentencepiece_model(user_defined_symbols=["<tool>", "▁ab", "\u00e9\u00e9"] if legacy is None else [])
  source = write(tmp_path, tokenizer_model=contents, tokenizer_config_json={} if legacy is None else {"legacy": legacy})
  files = tokenizer_files(source)
  assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
  ours = tokenizer.Tokenizer.from_files(files, CONFIG)
  backend = SentencePieceBackend(contents, {"legacy": legacy is not False})
  assert first_difference(lambda text: ours.encode(text, bos=False), backend.encode, ("<s>", "</s>", "<unk>")) is None
  assert (ours.bos_id, ours.eos_ids) == (1, (2,)) and ours.encode("a")[0] == 1
  for text in ("a b", "  two", "naïve \u00e9", "\U0001f642 x<tool>y"):
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("rule", [{"normalization_rule_name": "nmt_nfkc_cf"}, {"model_type": "unigram"}])
def test_sentencepiece_with_rules_of_its_own_stays(rule, tmp_path):
  contents = sentencepiece_model(**rule)
  files = tokenizer_files(write(tmp_path, tokenizer_model=contents))
  assert files["tokenizer.model"] == contents and "tokenizer.json" not in files
  assert json.loads(files["tokenizer_config.json"])["legacy"] is True
  assert exported_tokenizer(files, tokenizer.Tokenizer.from_files(files, CONFIG))["tokenizer.model"] == contents
  write(tmp_path, added_tokens_json={"<|im_start|>": 600})
  with pytest.raises(ConversionError, match=r"tokens cannot be added to this tokenizer.model: '<\|im_start\|>'"):
    tokenizer_files(tmp_path)


def test_added_tokens_of_sentencepiece(model, tmp_path):
  settings = {
    "add_bos_token": True, "bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
  }  # fmt: skip
  source = write(
    tmp_path,
    tokenizer_model=model,
    tokenizer_config_json=settings,
    added_tokens_json={"<|im_start|>": 600, "<|im_end|>": 601},
    config_json={"model_type": "llama"},
  )
  ours = read(source)
  assert ours.eos_ids == (601,) and ours.encode("<|im_start|>")[1:] == [600]
  wanted = transformers_ids(source, MARKED[:2])
  assert [ours.encode(text) for text in MARKED[:2]] == wanted
  write(tmp_path, added_tokens_json={"<|im_start|>": 605})
  with pytest.raises(ConversionError, match=r"'<\|im_start\|>' has the id 605 in the files, .* the id 600"):
    tokenizer_files(source)


def test_tokens_that_tokenizer_json_lacks(bpe, tmp_path):
  """Those of added_tokens.json, special_tokens_map.json, and a named one that is in no list."""
  source = write(
    tmp_path,
    tokenizer_json=byte_bpe(TEXT, 512),
    tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast"},
    added_tokens_json={"<|im_start|>": 512, "<|im_end|>": 513},
    special_tokens_map_json={"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<pad>"},
    config_json={"model_type": "llama"},
  )
  ours = read(source)
  texts = (*MARKED, "x<pad>y")
  assert [ours.encode(text) for text in texts] == transformers_ids(source, texts)
  assert ours.eos_ids == (513,) and ours.encode("<pad>") == [514]


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
  "settings, older",
  [
    ({"added_tokens_decoder": {"0": FLAGS | {"content": "<|endoftext|>", "rstrip": True}}}, {}),
    ({"added_tokens_decoder": {"0": FLAGS | {"content": "<|endoftext|>", "lstrip": True}}}, {}),
    ({"added_tokens_decoder": {"0": FLAGS | {"content": "<|endoftext|>", "single_word": True}}}, {}),
    ({"eos_token": "<|endoftext|>"}, {}),
    ({}, {"eos_token": {"content": "<|endoftext|>", "rstrip": True}}),
    ({}, {"eos_token": {"content": "<e>", "lstrip": True}}),
    ({"additional_special_tokens": ["<a1>"]}, {"additional_special_tokens": ["<b1>"], "eos_token": "<e>"}),
    ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, {}),
    ({"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}, {}),
  ],
)
@pytest.mark.parametrize("special", [True, False])
def test_what_settings_say_of_tokens(settings, older, special, tmp_path):
  """Flags of a token that tokenizer.json has with others, names, lists in two files: ids and text are transformers'."""
  transformers = pytest.importorskip("transformers")
  description = json.loads(byte_bpe(TEXT, 512))
  description["added_tokens"][0]["special"] = special
  settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
  source = write(
    tmp_path,
    tokenizer_json=description,
    tokenizer_config_json=settings,
    special_tokens_map_json=older,
    config_json={"model_type": "llama"},
  )
  ours, theirs = read(source), transformers.AutoTokenizer.from_pretrained(source)
  for text in ("a <|endoftext|> b", "x<|endoftext|>y", "hello world", "p<a1>q r <e>s"):
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_vocab_and_merges(bpe, tmp_path):
  merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in bpe["merges"])])
  source = write(
    tmp_path,
    vocab_json=bpe["vocab"],
    merges_txt=merges,
    tokenizer_config_json={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
    added_tokens_json={"<|im_start|>": 512, "<|im_end|>": 513},
    config_json={"model_type": "qwen2"},
  )
  ours = read(source)
  texts = [*hard_texts()[:300], *MARKED]
  assert [ours.encode(text) for text in texts] == transformers_ids(source, texts)
  (source / "merges.txt").unlink()
  with pytest.raises(ConversionError, match=r"merges.txt is missing"):
    tokenizer_files(source)
  write(source, merges_txt=merges, tokenizer_config_json={"tokenizer_class": "RobertaTokenizer"})
  with pytest.raises(ConversionError, match="of a RobertaTokenizer: only those of GPT2Tokenizer, Qwen2Tokenizer"):
    tokenizer_files(source)


def ranked(bpe):
  """Tokens in the order of their ranks, as bytes, without the special one."""
  tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)[1:]
  return [bytes(BYTE_OF[character] for character in token) for token in tokens]


def expected(bpe, kind, shift, special):
  """The same vocabulary, by its merges."""
  vocab = {token: i - 1 + shift for token, i in bpe["vocab"].items() if i}
  made = byte_level_bpe(vocab | special, [tuple(merge) for merge in bpe["merges"]], kind)
  made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
  return lambda text: made.encode(text, add_special_tokens=False).ids


def test_tekken(bpe, tmp_path):
  tokens = ranked(bpe)
  unused = [b"never", b"these"]
  pattern = json.loads(byte_level_bpe({"a": 0}, [], "tekken").to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]
  description = {
    "config": {
      "pattern": pattern["Regex"], "num_vocab_tokens": len(tokens) + 2, "default_vocab_size": len(tokens) + 25,
      "default_num_special_tokens": 25, "version": "v3",
    },
    "vocab": [
      {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
      for i, token in enumerate([*tokens, *unused])
    ],
  }  # fmt: skip
  ours = read(write(tmp_path, tekken_json=description))
  special = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3}
  theirs = expected(bpe, "tekken", 25, special)
  assert first_difference(lambda text: ours.encode(text, bos=False), theirs, list(special)) is None
  assert ours.vocab_size == len(tokens) + 25 and ours.encode("a")[0] == ours.bos_id == 1 and ours.eos_ids == (2,)
  description["config"]["pattern"] = "."
  with pytest.raises(ConversionError, match=r"splits texts by the pattern '\.'"):
    tokenizer_files(write(tmp_path, tekken_json=description))
  with pytest.raises(ConversionError, match=r"tekken.json is not what Mistral writes"):
    tokenizer_files(write(tmp_path, tekken_json="{}"))


def test_llama_3_tokenizer_model(bpe, tmp_path):
  tokens = ranked(bpe)
  contents = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
  special = {"<|begin_of_text|>": len(tokens), "<|eot_id|>": len(tokens) + 1}
  settings = {
    "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
    "added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in special.items()},
  }  # fmt: skip
  source = write(tmp_path, tokenizer_model=contents, tokenizer_config_json=settings)
  ours = read(source)
  theirs = expected(bpe, "llama-bpe", 0, special)
  assert first_difference(lambda text: ours.encode(text, bos=False), theirs, list(special)) is None
  assert ours.encode("a")[0] == ours.bos_id == len(tokens) and ours.eos_ids == (len(tokens) + 1,)
  (source / "tokenizer_config.json").unlink()
  with pytest.raises(ConversionError, match=r"tiktoken file of .* tokens, which does not list its special tokens"):
    tokenizer_files(source)


def test_llama_3s_own_special_tokens(bpe, tmp_path, monkeypatch):
  tokens = ranked(bpe)
  monkeypatch.setattr(tokenizer_vocabularies, "_LLAMA_3_RANKS", len(tokens))
  contents = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
  ours = read(write(tmp_path, tokenizer_model=contents))
  places = {
    "<|begin_of_text|>": 0,
    "<|finetune_right_pad_id|>": 4,
    "<|eot_id|>": 9,
    "<|reserved_special_token_247|>": 255,
  }
  assert {token: ours.encode(token, bos=False)[0] - len(tokens) for token in places} == places
  assert ours.vocab_size == len(tokens) + 256 and ours.encode("a")[0] == ours.bos_id == len(tokens)


@pytest.mark.parametrize("name", ["qwen_tiktoken", "spiece_model", "vocab_txt", "tokenizer_config_json"])
def test_what_is_not_read_is_named(tmp_path, name):
  source = write(tmp_path, **{name: "{}"})
  with pytest.raises(ConversionError, match=r"none of the vocabularies that are read"):
    tokenizer_files(source)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
  pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
  for name in ("tokenizer_model", "tokenizer_json"):
    with pytest.raises(ConversionError, match=r"is a pointer of Git LFS"):
      tokenizer_files(write(tmp_path, **{name: pointer}))


def test_chat_templates(bpe, tmp_path):
  transformers = pytest.importorskip("transformers")
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "stale"}
  source = write(tmp_path / "source", tokenizer_json=byte_bpe(TEXT, 512), tokenizer_config_json=settings)

  def template():
    out = tmp_path / "out"
    files = tokenizer_files(source)
    written = exported_tokenizer(files, tokenizer.Tokenizer.from_files(files, CONFIG))
    written |= {name: files[name] for name in files if name == "chat_template.jinja"}
    write(out)
    for name, contents in written.items():
      (out / name).write_bytes(contents)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained
    assert theirs(out).chat_template == theirs(source).chat_template
    return theirs(out).chat_template

  assert template() == "stale"
  (source / "chat_template.jinja").write_text("{{ messages }}\n")
  assert template() == "{{ messages }}\n"
  (source / "additional_chat_templates").mkdir()
  (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
  for left in (tmp_path / "out").iterdir():
    left.unlink()
  assert template() == {"default": "{{ messages }}\n", "tool_use": "tools"}


@pytest.mark.compat
def test_exports_give_our_ids(tmp_path):
  """Whatever the class and the flags were; `test_peers.py` has older releases."""
  for name, ours in exports(tmp_path).items():
    directory = tmp_path / "exported" / name
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings.get("additional_special_tokens", ["<|x|>"]) == ["<|x|>"]
    texts = ("Hello there", *MARKED[:2], *hard_texts()[:100])
    assert transformers_ids(directory, texts) == [ours.encode(text) for text in texts], name


def test_an_export_that_would_give_other_ids_is_refused(bpe):
  files = {"tokenizer.json": byte_bpe(TEXT, 512)}
  other = tokenizer.Tokenizer.from_files({"tokenizer.json": byte_bpe(TEXT, 400)}, CONFIG)
  with pytest.raises(ConversionError, match=r"The tokenizer.json to write gives"):
    exported_tokenizer(files, other)


@pytest.mark.parametrize(
  "generation, wanted",
  [
    ({}, Sampling()),
    ({"temperature": 0.6, "top_p": 0.9}, Sampling()),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, Sampling(0.6, 20, 0.95)),
    ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
  ],
)
def test_sampling_of_a_checkpoint(generation, wanted):
  assert Sampling.of_checkpoint(generation) == wanted
  assert Sampling.of_checkpoint(generation, temperature=0.5, top_k=None) == dataclasses.replace(wanted, temperature=0.5)


@pytest.mark.parametrize("wrong", [{"top_p": 2.0}, {"temperature": "0.6"}, {"top_k": -1}, {"top_k": 20.0}])
def test_sampling_that_cannot_be_names_its_file(wrong):
  """When text is drawn: the model can be loaded, and a flag takes its place."""
  with pytest.raises(ValueError, match=r"generation_config\.json says .*"):
    Sampling.of_checkpoint({"do_sample": True} | wrong)
  Sampling.of_checkpoint({"do_sample": True} | wrong, temperature=1.0, top_k=3, top_p=0.9)
  with pytest.raises(ValueError, match="temperature=nan: wanted a finite number, 0 or more"):
    Sampling.of_checkpoint({}, temperature=math.nan)


def test_sampling_that_is_not_supported_is_said():
  with pytest.warns(UserWarning, match="asks for typical_p=0.9, which is not supported"):
    sampling = Sampling.of_checkpoint({"repetition_penalty": 1.05, "typical_p": 0.9, "min_p": None})
  assert sampling == Sampling(repetition_penalty=1.05)
  drawn = Sampling.of_checkpoint({"do_sample": True, "min_p": 0.1, "top_p": 0.9}, top_p=0.8)
  assert drawn == Sampling(1.0, 50, 0.8, 0.1)


def test_a_text_that_begins_with_nothing_begins_without_a_space(model, tmp_path, random_params):
  """SentencePiece's own space before a text is none of the text; after a prompt a space is."""
  config = tiny().replace(vocab_size=600)
  lm = LM(config, random_params(config), read(write(tmp_path, tokenizer_model=model)))
  spaces = 0
  for seed in range(12):
    how = {"max_new_tokens": 1, "sampling": Sampling(temperature=1.0, seed=seed)}
    (drawn,) = generate_tokens(lm.model, lm.params, [1], **how)
    assert lm.generate("", max_new_tokens=1, temperature=1.0, seed=seed) == lm.tokenizer.decode([1, drawn])
    spaces += lm.tokenizer.decode([drawn], continues=True) != lm.tokenizer.decode([drawn])
  assert spaces
