"""Conversations to train on: which tokens are learned, in rows, and that special tokens in messages stay text."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from convert_weights.tokenizer_source import tokenizer_files
from supra_jax.data import loading, packed, packing, packing_job
from supra_jax.data.chat_template import ChatTemplate
from supra_jax.data.conversations import TemplateUnfit, encode_conversation, messages_of
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments.tiny import byte_bpe
from supra_jax.model.presets import tiny
from tests.convert_weights.tokenizer_kinds import TEXT, sentencepiece_model
from tests.data.test_packing import contents

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
  assert made.ids == tokenizer.encode(tokenizer.template.render(TALK, reply=False), bos=False) and made.note == ""
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
  assert "the last one alone is learned" in encode_conversation(tokenizer, talk).note
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
  assert ("generation does not stop there" in encode_conversation(tokenizer, TALK[1:]).note) != ends


def test_an_end_that_does_not_end_a_text_is_said():
  made = encode_conversation(tokenizer_of(eos="<|endoftext|>"), TALK)
  assert made.note.startswith(f"Answers end with '{END}', which ends no text of this model")


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
    ([{"role": "user"}, *TALK], "message 0 has no role or no content"),
    ([*TALK, "Hi"], "message 5 has no role or no content"),
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


def talks(count: int) -> list[list[dict[str, str]]]:
  """Conversations of different lengths."""
  return [
    [
      message
      for turn in range(1 + number % 3)
      for message in (
        {"role": "user", "content": f"Question {number}, {turn}? " + "why " * (number % 7)},
        {"role": "assistant", "content": f"Answer {number}: {turn}." + " because" * (number % 5)},
      )
    ]
    for number in range(count)
  ]


def write(path, records) -> None:
  """Writes records in the form of the file's ending."""
  if path.suffix == ".parquet":
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: [r[name] for r in records] for name in records[0]}), path)
  elif path.suffix == ".json":
    path.write_text(json.dumps(records))
  else:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def prepare(input, output, tokenizer, **how):
  how = {"vocab_size": 10_000, "sequence_length": 32, "messages_key": "talk", "workers": 0} | how
  return packing.prepare(str(input), tokenizer, output, **how)


@pytest.mark.parametrize("documents", ["separate", "join"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_rows_say_what_is_learned(name, documents, tmp_path):
  write(tmp_path / name, [{"id": i, "talk": talk} for i, talk in enumerate(talks(30))])
  tokenizer = tokenizer_of()
  made = prepare(tmp_path / name, tmp_path / "out", tokenizer, documents=documents)
  whole = [encode_conversation(tokenizer, talk) for talk in talks(30)]
  ids, learned = np.concatenate([w.ids for w in whole]), np.concatenate([w.learned for w in whole])
  dataset = loading.PackedDataset(tmp_path / "out/train")
  rows = [dataset[i] for i in range(len(dataset))]
  for i, row in enumerate(rows):
    at = slice(i * 32, (i + 1) * 32 + 1)
    assert row["tokens"].tolist() == ids[at].tolist() and row["target_weights"].tolist() == learned[at].tolist()
    assert ("segment_ids" in row) == (documents == "separate")
  count = sum(int(row["target_weights"][1:].sum()) for row in rows)  # an answer is never the first of its document
  assert made.train.learned_tokens == count == packed.verify(tmp_path / "out/train").learned_tokens
  assert f"{count:,} of them answers" in made.lines("out")[0]
  batch = next(loading.make_loader([(str(tmp_path / "out/train"), 1.0)], batch_size=2, seed=0))
  assert batch["target_weights"].dtype == np.int32 and batch["target_weights"].shape == (2, 33)


def test_conversations_among_texts(tmp_path):
  """Rows of text are learned whole."""
  tokenizer = tokenizer_of()
  write(tmp_path / "a.jsonl", [{"talk": talk} for talk in talks(30)])
  write(tmp_path / "b.jsonl", [{"text": "word " * 40} for _ in range(20)])
  prepare(tmp_path / "a.jsonl", tmp_path / "a", tokenizer)
  prepare(tmp_path / "b.jsonl", tmp_path / "b", tokenizer, messages_key="", documents="separate")
  assert loading.PackedDataset(tmp_path / "b/train").info.leaves == ("tokens", "segment_ids")
  sources = [(str(tmp_path / name / "train"), 1.0) for name in "ab"]
  batches = loading.make_loader(sources, batch_size=4, seed=0)
  means = [float(row.mean()) for _ in range(6) for row in next(batches)["target_weights"]]
  assert any(mean == 1 for mean in means) and any(0 < mean < 1 for mean in means)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_killed_goes_on(workers, tmp_path, monkeypatch):
  monkeypatch.setattr("supra_jax.data.text.PIECE_BYTES", 500)
  tokenizer = tokenizer_of()
  write(tmp_path / "a.jsonl", [{"talk": talk} for talk in talks(120)])
  how = {"shard_bytes": 4000, "heldout_every": 10}
  prepare(tmp_path / "a.jsonl", tmp_path / "whole", tokenizer, **how)
  take, taken = packing_job.Job.take, []

  def interrupted(self, *given):
    taken.append(given)
    if len(taken) == 30:
      raise KeyboardInterrupt
    take(self, *given)

  with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
    broken.setattr(packing_job.Job, "take", interrupted)
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, **how)
  assert (tmp_path / "out.partial" / packing_job.JOURNAL_FILE).exists()
  prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, workers=workers, **how)
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  # Another template is other data.
  other = tokenizer_of(CHATML.replace("' + m.role", "The ' + m.role"))
  with pytest.raises(ValueError, match="chat_template_sha256"):
    prepare(tmp_path / "a.jsonl", tmp_path / "out", other, **how)


def test_bad_conversations(tmp_path):
  alternating = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  alternating += "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
  tokenizer = tokenizer_of(alternating)
  records = [{"talk": talk} for talk in talks(20)]
  records[3] = {"talk": [{"role": "user", "content": "Hi"}, *records[3]["talk"]]}
  records[5] = {"talk": "Hi"}
  records[7] = {"other": 1}
  write(tmp_path / "a.jsonl", records)
  with pytest.raises(
    ValueError, match=r"a\.jsonl, line 4: chat_template\.jinja refuses these messages: roles must alt"
  ):
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
  made = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, skip_bad=True)
  assert made.bad == 3 and made.train.documents == 17
  assert any("line 6: no conversation under 'talk': wanted a list of messages" in said for said in made.bad_first)
  assert any(
    "line 4: chat_template.jinja refuses these messages: roles must alternate" in said for said in made.bad_first
  )
  # A template that fits no conversation is nobody's bad line.
  with pytest.raises(TemplateUnfit, match=r"a\.jsonl, line 1: chat_template\.jinja renders"):
    prepare(tmp_path / "a.jsonl", tmp_path / "unfit", tokenizer_of(UNFIT), skip_bad=True)


@pytest.mark.parametrize("name, text", [("a.txt", "Hi"), ("a.csv", "talk\nHi\n"), ("a.md", "Hi")])
def test_files_without_conversations(name, text, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=r"wanted conversations, which are in \.jsonl"):
    prepare(tmp_path / name, tmp_path / "out", tokenizer_of())


def test_without_a_template(tmp_path):
  write(tmp_path / "a.jsonl", [{"talk": talk} for talk in talks(3)])
  bare = Tokenizer.from_files({"tokenizer.json": byte_bpe(TEXT, 512)}, CONFIG)
  with pytest.raises(ValueError, match="the tokenizer comes without a chat template"):
    prepare(tmp_path / "a.jsonl", tmp_path / "out", bare)
