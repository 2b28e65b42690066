"""Conversations to train on: which tokens are learned, in rows, and that special tokens in messages stay text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from convert_weights.tokenizer_source import tokenizer_files
from supra_jax.data.chat_template import ChatTemplate
from supra_jax.data.conversations import TemplateUnfit, encode_conversation, messages_of
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments.tiny import byte_bpe
from supra_jax.model.presets import tiny
from tests.convert_weights.tokenizer_kinds import TEXT, sentencepiece_model

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: what was thought is left out of earlier answers.
THINKING = CHATML.replace(
  "m.content +", "(m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1]) +"
)
# As DeepSeek-R1's: an answer begins with a thought, and is then rendered without one.
UNFIT = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ 'USER: ' + m.content if m.role == 'user' else ' ASSISTANT: ' + m.content }}"
  "{{ eos_token if m.role == 'assistant' and ends }}{% endfor %}"
  "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TALK = [
  {"role": "system", "content": "Be short."},
  {"role": "user", "content": "What is a name?"},
  {"role": "assistant", "content": "A rose."},
  {"role": "user", "content": "And 2 + 2?"},
  {"role": "assistant", "content": "Four, I think."},
]
CONFIG = tiny().replace(vocab_size=10_000, bos_token_id=None, eos_token_ids=())


def with_specials(json_text: bytes, **flags) -> bytes:
  """A tokenizer.json that knows the marks of ChatML."""
  description = json.loads(json_text)
  first = max([*description["model"]["vocab"].values(), *(token["id"] for token in description["added_tokens"])]) + 1
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags}
  description["added_tokens"] += [
    {"id": first + i, "content": content, **plain} for i, content in enumerate((START, END))
  ]
  return json.dumps(description).encode()


def tokenizer_of(template=CHATML, eos=END, **flags) -> Tokenizer:
  files = {"tokenizer.json": with_specials(byte_bpe(TEXT, 512), **flags), "chat_template.jinja": template.encode()}
  settings = {"bos_token": "<|endoftext|>", "eos_token": eos}
  return Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(settings).encode()}, CONFIG)


def learned_texts(tokenizer, messages) -> list[str]:
  """The stretches of a conversation that are learned."""
  made = encode_conversation(tokenizer, messages)
  texts = [""]
  for token, learned in zip(made.ids, made.learned, strict=True):
    if learned:
      texts[-1] += tokenizer.decode([token], keep_special=True, continues=True)
    elif texts[-1]:
      texts.append("")
  return [text for text in texts if text]


def test_answers_are_learned_with_the_token_that_ends_them():
  tokenizer = tokenizer_of()
  assert learned_texts(tokenizer, TALK) == [f"A rose.{END}", f"Four, I think.{END}"]
  made = encode_conversation(tokenizer, TALK)
  assert made.ids == tokenizer.encode(tokenizer.template.render(TALK, reply=False), bos=False) and made.notes == []
  # Before a learned answer there is what `lm.chat` reads.
  begins = int(np.flatnonzero(made.learned)[-1]) + 1 - len(tokenizer.encode(f"Four, I think.{END}", bos=False))
  assert made.ids[:begins] == tokenizer.encode_chat(TALK[:4])
  assert learned_texts(tokenizer, [{"role": "assistant", "content": "Hello!"}, *TALK[1:]]) == learned_texts(
    tokenizer, TALK
  )


def test_it_is_transformers_mask_and_the_end():
  """Their mask is of what the template puts into {% generation %}; here that is the content alone."""
  transformers = pytest.importorskip("transformers")
  template = CHATML.replace(
    "m.content + '<|im_end|>\\n' }}",
    "}}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\\n' }}",
  ).replace("'\\n' + }}", "'\\n' }}")
  tokenizer = tokenizer_of(template)
  from tokenizers import Tokenizer as Opened

  opened = Opened.from_str(with_specials(byte_bpe(TEXT, 512)).decode())
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=opened, chat_template=template)
  how = {"return_dict": True, "return_assistant_tokens_mask": True, "add_special_tokens": False}
  want = theirs.apply_chat_template(TALK, **how)
  made = encode_conversation(tokenizer, TALK)
  assert made.ids == list(want["input_ids"])
  mask = np.array(want["assistant_masks"], bool)
  ends = np.flatnonzero(~mask & made.learned)
  assert (mask <= made.learned).all() and [tokenizer.decode([made.ids[i]], keep_special=True) for i in ends] == [
    END
  ] * 2


def test_a_template_that_rewrites_earlier_answers_learns_the_last():
  talk = [{**m, "content": "<think>hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in TALK]
  tokenizer = tokenizer_of(THINKING)
  assert learned_texts(tokenizer, talk) == [f"<think>hm</think>Four, I think.{END}"]
  assert "the last one alone is learned" in "".join(encode_conversation(tokenizer, talk).notes)
  assert len(learned_texts(tokenizer, TALK)) == 2  # nothing was thought


def test_a_template_whose_answers_cannot_be_told_is_refused():
  with pytest.raises(TemplateUnfit, match=r"renders what comes before an answer otherwise.*<think>.*Four"):
    encode_conversation(tokenizer_of(UNFIT), TALK)


@pytest.mark.parametrize("ends", [True, False])
def test_a_template_without_marks(ends):
  """The text of an answer is all there is, with the space before it; what ends no text is said."""
  model = {"tokenizer.model": sentencepiece_model()}
  settings = {"bos_token": "<s>", "eos_token": "</s>"}
  template = PLAIN.replace("and ends", "" if ends else "and false")
  tokenizer = Tokenizer.from_files(
    {**model, "chat_template.jinja": template.encode(), "tokenizer_config.json": json.dumps(settings).encode()}, CONFIG
  )
  stop = "</s>" if ends else ""
  assert learned_texts(tokenizer, TALK[1:]) == [f" A rose.{stop}", f" Four, I think.{stop}"]
  assert ("generation does not stop there" in "".join(encode_conversation(tokenizer, TALK[1:]).notes)) != ends


def test_an_end_that_does_not_end_a_text_is_said():
  made = encode_conversation(tokenizer_of(eos="<|endoftext|>"), TALK)
  assert made.notes[0].startswith(f"Answers end with '{END}', which ends no text of this model")


@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("kind", ["byte-level", "metaspace first", "metaspace always", "prepended", "sentencepiece"])
def test_special_tokens_in_messages_stay_text(kind, flags):
  """And nothing else changes: read section by section, a text without any has the ids that it has as a whole."""
  if kind == "sentencepiece":
    files = {"tokenizer.model": sentencepiece_model()}
    marks = "<s>", "</s>"
  else:
    files, marks = {"tokenizer.json": with_specials(described(kind), **flags)}, (START, END)
  template = CHATML.replace(START, marks[0]).replace(END, marks[1])
  tokenizer = Tokenizer.from_files({**files, "chat_template.jinja": template.encode()}, CONFIG)
  texts = ["  Hi there ", "", "a\n\n b", "ünï \u00a0x ", "<|im_start", "trailing  \n"]
  for text in texts:
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "x " + text}]
    rendered = tokenizer.template.render(talk, reply=False)
    assert tokenizer._backend.encode(rendered, marked=True) == tokenizer._backend.encode(rendered)
  special = {tokenizer._backend.token_id(mark) for mark in marks}
  plain = tokenizer.encode_chat([{"role": "user", "content": "A B C"}])
  spelled = tokenizer.encode_chat([{"role": "user", "content": f"A {marks[1]}B{marks[0]}{marks[0]} C"}])
  assert sum(i in special for i in spelled) == sum(i in special for i in plain) == 3
  assert len(spelled) > len(plain) + 6
  decoded = tokenizer.decode(spelled, keep_special=True)
  said = tokenizer.template.render([{"role": "user", "content": f"A {marks[1]}B{marks[0]}{marks[0]} C"}])
  assert "".join(decoded.split()) == "".join(said.split())  # marks that strip take white space with them
  parts = [{"type": "text", "text": f"A {marks[1]}"}]
  listed = CHATML.replace("m.content +", "m.content[0].text +").replace(START, marks[0]).replace(END, marks[1])
  tokenizer.template = ChatTemplate(listed, {})
  assert sum(i in special for i in tokenizer.encode_chat([{"role": "user", "content": parts}])) == 3


def described(kind: str) -> bytes:
  """A tokenizer.json that writes spaces as `kind` says."""
  if kind == "byte-level":
    return byte_bpe(TEXT, 512)
  with tempfile.TemporaryDirectory() as directory:
    (Path(directory) / "tokenizer.model").write_bytes(sentencepiece_model())
    description = json.loads(tokenizer_files(Path(directory))["tokenizer.json"])
  if kind == "prepended":
    description["normalizer"] = {
      "type": "Sequence",
      "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
      ],
    }
    description["pre_tokenizer"] = None
  else:
    description["normalizer"] = None
    scheme = kind.removeprefix("metaspace ")
    description["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
  return json.dumps(description).encode()


@pytest.mark.parametrize(
  "value, said",
  [
    ("Hi", "wanted a list of messages"),
    ([], "wanted a list of messages"),
    ([{"role": "user", "content": "Hi"}], "no message of the assistant answers another"),
    ([{"role": "assistant", "content": "Hi"}], "no message of the assistant answers another"),
    ([{"role": "user"}, *TALK], "message 0 has no content"),
    ([{"content": "Hi"}, *TALK], "message 0 has no role"),
    ([{"from": ["human"], "value": "Hi"}, *TALK], "message 0 has no role"),
    ([*TALK, "Hi"], "message 5 is no object"),
    ([{"role": "user", "content": [{"type": "image"}]}, *TALK], "the content of message 0 is no text"),
    ([{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hi"}], "the roles are user, bot"),
  ],
)
def test_what_is_no_conversation(value, said):
  with pytest.raises(ValueError, match=said):
    messages_of(value)


def test_sharegpt():
  shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
  assert messages_of(shared) == [
    {"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))
  ]


def test_contents_in_other_forms():
  """Parts of text are one text; what is null, as absent keys of parquet files are, is not there."""
  call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
  given = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
    {"role": "assistant", "tool_calls": [call]},
    {"role": "tool", "content": "3", "name": None},
    {"role": "assistant", "content": None},
  ]
  assert (
    messages_of(given)
    == messages_of(json.dumps(given))
    == [
      {"role": "user", "content": "ab"},
      {"role": "assistant", "content": "", "tool_calls": [call]},
      {"role": "tool", "content": "3"},
      {"role": "assistant", "content": ""},
    ]
  )


@pytest.mark.parametrize("answer", ["    x = 1", "\n\nhello", "\thello", "", " "])
def test_an_answer_that_begins_with_spaces(answer):
  """A token across its beginning would be another than those that are generated there."""
  tokenizer = tokenizer_of()
  talk = [TALK[1], {"role": "assistant", "content": answer}, TALK[1], {"role": "assistant", "content": "A rose."}]
  assert learned_texts(tokenizer, talk) == [f"{answer}{END}", f"A rose.{END}"]
  made = encode_conversation(tokenizer, talk)
  begin = int(np.flatnonzero(made.learned)[0])
  assert made.ids[:begin] == tokenizer.encode_chat(talk[:1]) and made.notes == []
  assert tokenizer.decode(made.ids, keep_special=True) == tokenizer.template.render(talk, reply=False)


def test_what_comes_behind_the_last_answer_is_left_out():
  tokenizer = tokenizer_of(THINKING)
  one, other = (encode_conversation(tokenizer, talk) for talk in (TALK, [*TALK, {"role": "user", "content": "Bye"}]))
  assert one.ids == other.ids and one.learned.tolist() == other.learned.tolist() and other.notes == []


def test_a_template_that_always_begins_an_answer():
  """As Llama 3's first one: what begins another answer is no part of this one."""
  tokenizer = tokenizer_of(CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"))
  assert learned_texts(tokenizer, TALK) == [f"A rose.{END}", f"Four, I think.{END}"]


def test_special_tokens_in_other_fields_stay_text():
  tokenizer = tokenizer_of(CHATML.replace("m.content +", "(m.reasoning_content or '') + m.content +"))
  message = {"role": "user", "content": "Hi", "reasoning_content": f"{END}{START}"}
  special = {tokenizer._backend.token_id(mark) for mark in (START, END)}
  assert sum(i in special for i in tokenizer.encode_chat([message])) == 3
