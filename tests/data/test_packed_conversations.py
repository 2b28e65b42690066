"""Conversations in rows: what is learned is said of each token, in every kind of file, and nothing is lost."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from supra_jax.data import loading, packed, packing, packing_job
from supra_jax.data.conversations import TemplateUnfit, encode_conversation
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments.tiny import byte_bpe
from tests.convert_weights.tokenizer_kinds import TEXT
from tests.data.test_conversations import CHATML, CONFIG, TALK, UNFIT, tokenizer_of
from tests.data.test_packing import contents


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
  begins = np.concatenate([np.arange(len(w.ids)) == 0 for w in whole])
  cuts = [slice(i * 32, (i + 1) * 32 + 1) for i in range((len(ids) - 1) // 32)]
  # A row in which nothing is to be learned is left out.
  targets = [(learned[at] & ~(begins[at] & (documents == "separate")))[1:].any() for at in cuts]
  kept = [at for at, some in zip(cuts, targets, strict=True) if some]
  assert len(rows) == len(kept) < len(cuts)
  assert made.train.tokens + made.train.dropped_tokens == len(ids) - 1
  for at, row in zip(kept, rows, strict=True):
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


def test_tools_are_given_to_the_template(tmp_path):
  tokenizer = tokenizer_of("{% for tool in tools or [] %}{{ '[' + tool.name + ']' }}{% endfor %}" + CHATML)
  write(tmp_path / "a.jsonl", [{"talk": TALK, "tools": [{"name": "add"}]}])
  prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, sequence_length=60)
  (row, *_) = loading.PackedDataset(tmp_path / "out/train")
  assert tokenizer.decode(row["tokens"], keep_special=True).startswith("[add]<|im_start|>system")


def test_a_directory_of_conversations_and_other_files(tmp_path):
  (tmp_path / "data").mkdir()
  write(tmp_path / "data/a.jsonl", [{"talk": talk} for talk in talks(10)])
  (tmp_path / "data/notes.txt").write_text("Hi")
  made = prepare(tmp_path / "data", tmp_path / "out", tokenizer_of())
  assert made.files == 1 and made.train.documents == 10 and made.lines("out")[-1].startswith("1 file read, ")
  with pytest.raises(ValueError, match=r"output=.*packed lies within the input .*data, and would be read as text"):
    prepare(tmp_path / "data", tmp_path / "data/packed", tokenizer_of())
  with pytest.raises(ValueError, match=r"line 1: nothing under 'messages'; its keys are talk"):
    prepare(tmp_path / "data", tmp_path / "other", tokenizer_of(), messages_key="messages")
  with pytest.raises(ValueError, match=r"bos=True: conversations begin as the chat template says"):
    prepare(tmp_path / "data", tmp_path / "other", tokenizer_of(), bos=True)


def test_rows_without_answers(tmp_path):
  """Nothing is learned of them, so that they are not there."""
  long = [{"role": "user", "content": "why " * 400}, {"role": "assistant", "content": "So."}]
  write(tmp_path / "a.jsonl", [{"talk": long}] * 5)
  made = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_of())
  dataset = loading.PackedDataset(tmp_path / "out/train")
  assert 1 <= len(dataset) <= 6 and all(row["target_weights"][1:].any() for row in dataset)
  assert made.train.dropped_tokens > 5 * 400
