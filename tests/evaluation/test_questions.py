"""Questions about long documents are read from each format in which they are published."""

import csv
import json

import pytest

from supra_jax.evaluation.questions import Question, read_questions


def annotation(*, spans=(), free="", yes_no=None, unanswerable=False):
  answer = {"unanswerable": unanswerable, "extractive_spans": list(spans), "yes_no": yes_no, "free_form_answer": free}
  return {"answer": answer | {"evidence": [], "highlighted_evidence": []}, "annotation_id": "a", "worker_id": "w"}


def paper(title, questions):
  """A paper as in Qasper's release; `questions` maps id -> (question, annotations)."""
  sections = [("Introduction", ["We begin.", ""]), (None, ["No name."]), ("Method ::: Part", ["We end."])]
  return {
    "title": title,
    "abstract": "We did it.",
    "full_text": [{"section_name": name, "paragraphs": paragraphs} for name, paragraphs in sections],
    "qas": [{"question": asked, "question_id": i, "answers": found} for i, (asked, found) in questions.items()],
  }


ONE = {
  "q1": ("What?", [annotation(spans=["a lexicon", "seeds"]), annotation(free="a list")]),
  "q2": ("Is it?", [annotation(yes_no=True), annotation(yes_no=False), annotation(unanswerable=True)]),
  "q3": ("Nobody answered?", []),
}
TEXT = "One\nWe did it.\nIntroduction\nWe begin.\nNo name.\nMethod ::: Part\nWe end."


def test_qasper(tmp_path):
  (tmp_path / "qasper-dev-v0.3.json").write_text(json.dumps({"1": paper("One", ONE)}))
  (tmp_path / "qasper-train-v0.3.json").write_text(
    json.dumps({"2": paper("Two", {"q": ("Why?", [annotation(free="So")])})})
  )
  first, second = read_questions("qasper", tmp_path, "validation")
  assert first == Question("q1", TEXT, "What?", ("a lexicon, seeds", "a list"), ("extractive", "abstractive"))
  assert second.answers == ("Yes", "No", "Unanswerable") and second.kinds == ("boolean", "boolean", "none")
  (other,) = read_questions("qasper", tmp_path, "train")
  assert other.text == "Why?" and other.document.startswith("Two\n")
  assert read_questions("qasper", tmp_path / "qasper-dev-v0.3.json", "test") == [first, second]  # a file is the split


@pytest.mark.parametrize("task, folder", [("qasper", "qasper"), ("narrativeqa", "narrative_qa")])
def test_scrolls(tmp_path, task, folder):
  rows = [
    {"id": "1", "pid": "1_0", "input": "Who?\n\nA tale.\n\nOf two.", "output": "Ann"},
    {"id": "2", "pid": "2_0", "input": "Where?\n\nAnother.", "output": "Here"},
    {"id": "1", "pid": "1_1", "input": "Who?\n\nA tale.\n\nOf two.", "output": "Bob"},
    {"id": "3", "pid": "3_0", "input": "When?\n\nA tale.\n\nOf two.", "output": "Now"},
  ]
  for name in ("qasper", "narrative_qa"):
    (tmp_path / name).mkdir()
  (tmp_path / folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  got = read_questions(task, tmp_path, "validation")
  assert got == [
    Question("1", "A tale.\n\nOf two.", "Who?", ("Ann", "Bob")),
    Question("3", "A tale.\n\nOf two.", "When?", ("Now",)),  # beside the other about its document
    Question("2", "Another.", "Where?", ("Here",)),
  ]


STORY = "<html>A tale begins here. All is well. And they lived on. Licence."


def write_tables(directory):
  tables = {
    "documents.csv": [
      {"document_id": "d1", "set": "valid", "kind": "movie", "story_start": "A tale", "story_end": "lived on."},
      {"document_id": "d2", "set": "train", "kind": "movie", "story_start": "Not", "story_end": "there"},
    ],
    "qaps.csv": [
      {"document_id": "d2", "set": "train", "question": "Why?", "answer1": "So", "answer2": "Thus"},
      {"document_id": "d1", "set": "valid", "question": "How, then?", "answer1": "Well", "answer2": "All well"},
    ],
  }
  for name, rows in tables.items():
    with (directory / name).open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0].keys())
      writer.writeheader()
      writer.writerows(rows)
  (directory / "tmp").mkdir()
  for name in ("d1", "d2"):
    (directory / "tmp" / f"{name}.content").write_text(STORY)


def test_narrativeqa_in_tables(tmp_path):
  write_tables(tmp_path)
  (question,) = read_questions("narrativeqa", tmp_path, "validation")
  assert question.text == "How, then?" and question.answers == ("Well", "All well")
  assert question.document == "A tale begins here. All is well. And they lived on."
  (question,) = read_questions("narrativeqa", tmp_path, "train")
  assert question.document == STORY  # its first and last words are not to be found


def test_narrativeqa_in_parquet(tmp_path):
  import pyarrow
  from pyarrow import parquet

  def row(name, question, *answers):
    document = {"id": name, "kind": "gutenberg", "text": f"The book {name}."}
    asked = {"text": question, "tokens": question.split()}
    return {"document": document, "question": asked, "answers": [{"text": x, "tokens": x.split()} for x in answers]}

  rows = [row("a", "Who?", "Ann", "She"), row("b", "Why?", "So", "Thus"), row("a", "Who?", "Bob", "He")]
  (tmp_path / "data").mkdir()
  for part in range(2):
    name = f"validation-0000{part}-of-00002.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows[2 * part : 2 * part + 2]), tmp_path / "data" / name)
  got = read_questions("narrativeqa", tmp_path, "validation")
  assert [(q.document, q.text, q.answers) for q in got] == [
    ("The book a.", "Who?", ("Ann", "She")),
    ("The book a.", "Who?", ("Bob", "He")),
    ("The book b.", "Why?", ("So", "Thus")),
  ]
  assert len({q.key for q in got}) == 3


def test_what_is_missing_or_damaged_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no files of qasper .* that name dev, valid, validation"):
    read_questions("qasper", tmp_path, "validation")
  with pytest.raises(ValueError, match="task='squad'"):
    read_questions("squad", tmp_path, "validation")
  for name, contents in {
    "dev.json": '{"1": {"title": 3}}',
    "valid.jsonl": '{"id": 1}\n',
    "validation.jsonl": "[\n",
  }.items():
    (tmp_path / name).write_text(contents)
    with pytest.raises(ValueError, match=rf"{name}: not a file of qasper"):
      read_questions("qasper", tmp_path, "validation")
    (tmp_path / name).unlink()
  (tmp_path / "test.jsonl").write_text(
    '{"id": "1", "input": "Who?\\n\\nA tale.", "output": null}\n'
  )  # SCROLLS keeps its own
  with pytest.raises(ValueError, match="no question of qasper, test, has an answer"):
    read_questions("qasper", tmp_path, "test")
  bad = json.dumps({"1": paper("One", {"q": ("What?", [annotation()])})})
  (tmp_path / "dev.json").write_text(bad)
  with pytest.raises(ValueError, match="neither unanswerable"):
    read_questions("qasper", tmp_path, "validation")
