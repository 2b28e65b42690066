"""Tables 1 and 2 of tiny models: one that fails does not stop the others, and none is asked twice."""

import json
import shutil
from pathlib import Path

import pytest

from supra_jax.evaluation import comparison, paper
from supra_jax.experiments import tables_1_2, tiny
from supra_jax.experiments.gathered import first_line, gather, named, slug
from supra_jax.experiments.paper_models import MODELS, commands
from supra_jax.experiments.tables_1_2 import table_1, table_2
from tests.evaluation.test_questions import annotation
from tests.evaluation.test_questions import paper as qasper_paper

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS = {"tasks": ("hellaswag", "winogrande")}
ANSWERS = {"lengths": (32, 64), "max_new_tokens": 4, "shots": {"qasper": 0}}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Directories of an RNN and a transformer."""
  made = tmp_path_factory.mktemp("models")
  rnn = tiny.write_checkpoint(made / "rnn", "supra")
  return {"rnn": rnn, "softmax": tiny.write_checkpoint(made / "softmax", "softmax", max_positions=64)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  scene = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a.", "b.", "c.", "d."]}
  sentence = {"sentence": "Sarah met Sandra since _ was there.", "option1": "Sarah", "option2": "Sandra"}
  rows = {
    "hellaswag": [scene | {"label": str(i % 4), "ctx_a": f"A man sits{' on' * i}."} for i in range(4)],
    "winogrande": [sentence | {"answer": str(1 + i % 2)} for i in range(3)],
  }
  for name, lines in rows.items():
    (directory / name).mkdir()
    (directory / name / "validation.json").write_text(json.dumps(lines))
  return directory


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
  directory = tmp_path_factory.mktemp("documents")
  asked = {"q1": ("What?", [annotation(spans=["a lexicon"])]), "q2": ("Is it?", [annotation(yes_no=True)])}
  (directory / "qasper-dev-v0.3.json").write_text(json.dumps({"1": qasper_paper("One", asked)}))
  return directory


def quiet(line):
  del line


def test_a_model_that_fails_between_two_others(models, questions, tmp_path):
  said = []
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "config.json").write_text("{}")
  given = [f"RNN={models['rnn']}", f"gone=hf:{tmp_path}/gone", f"broken={broken}", f"T={models['softmax']}"]
  output = tmp_path / "out" / "table.json"
  text = table_1(given, output, data_dir=questions, limit=2, say=said.append, **TASKS)
  lines = text.splitlines()
  assert lines[2 + len(paper.TABLE_1)].startswith("| **RNN** |  |  | ")
  assert lines[4 + len(paper.TABLE_1)].startswith(f"| **gone** | not run: --compare=hf:{tmp_path}/gone: wanted")
  assert lines[5 + len(paper.TABLE_1)].startswith("| **broken** | not run: ") and "The last rows are of 2 quest" in text
  assert {line.count("|") for line in lines[: 6 + len(paper.TABLE_1)]} == {len(paper.COLUMNS) + 5}
  assert [line.partition(":")[2].strip().split(":")[0] for line in said] == ["done.", "not run", "not run", "done."]

  kept = json.loads(output.read_text())
  assert list(kept["models"]) == ["RNN", "T"] and list(kept["not_run"]) == ["gone", "broken"]
  assert kept["models"]["RNN"]["made_by"].keys() >= {"commit", "packages", "command"}
  for name, model in kept["models"].items():
    exam = comparison.Exam(TASKS["tasks"], data_dir=questions, limit=2)
    alone = comparison.evaluate_tasks(tables_1_2.load(model["spec"]), exam)
    score = alone["results"]["hellaswag"]["acc_norm,none"]
    assert model["results"]["percent"]["HellaSwag"] == pytest.approx(100 * score), name
    assert model["results"]["percent"]["MMLU"] is None
  assert output.with_suffix(".md").read_text() == text + "\n"
  assert output.with_suffix(".png").stat().st_size > 5000
  assert sorted(path.name for path in output.parent.iterdir()) == ["table.json", "table.md", "table.png"]


def test_no_path_of_this_machine_is_written(models, questions, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(models["rnn"], "model")
  shutil.copytree(questions, "questions")
  table_1(["RNN=model", "none"], "table.json", data_dir="questions", limit=1, say=quiet, **TASKS)
  written = (tmp_path / "table.json").read_text()
  for path in (ROOT, Path.home(), tmp_path, models["rnn"]):
    assert len(path.parts) == 1 or f"{path}/" not in written, path
  monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
  assert first_line(OSError(f"\n {tmp_path}/x and /home/me/y, /home/men\nmore")) == "./x and ~/y, /home/men"
  assert first_line(KeyError()) == "KeyError"


def test_what_is_known_is_not_asked_again(models, questions, tmp_path, monkeypatch):
  output, how = tmp_path / "table.json", {"data_dir": questions, "limit": 1, "say": quiet, **TASKS}
  asked = []
  loader = comparison.loader

  def interrupted(spec, trust):
    asked.append(Path(spec).name)
    if spec == str(models["softmax"]) and asked.count("softmax") == 1:
      raise KeyboardInterrupt
    return loader(spec, trust)

  monkeypatch.setattr(comparison, "loader", interrupted)
  own = shutil.copytree(models["rnn"], tmp_path / "rnn")
  given = [f"RNN={own}", f"T={models['softmax']}"]
  with pytest.raises(KeyboardInterrupt):
    table_1(given, output, **how)
  assert list(json.loads(output.read_text())["models"]) == ["RNN"]
  shutil.rmtree(own)  # its results stay, as if another model had taken its room on the disk
  whole = table_1(given, output, **how)
  assert asked == ["rnn", "softmax", "softmax"] and "**RNN**" in whole and "**T**" in whole
  assert table_1(given[1:], output, **how) == whole and len(asked) == 3
  tiny.write_checkpoint(own, "supra", num_heads=2, num_kv_heads=2)
  table_1(given, output, **how)
  assert asked[3:] == ["rnn"]  # another model in the same place
  (own / "config.json").write_text("{}")
  assert "| **RNN** | not run: " in table_1(given, output, **how)
  assert list(json.loads(output.read_text())["models"]) == ["RNN", "T"]  # results that were there are not lost
  with pytest.raises(ValueError, match=r"table.json holds results for limit=1, not 2: take another --output"):
    table_1(given, output, **how | {"limit": 2})
  with pytest.raises(ValueError, match=r"holds results for data=None, not \{\}"):
    gather({"T": "x"}, output, {"data": {}}, lambda name, spec: None)


def test_a_home_is_found(models, questions, tmp_path, monkeypatch):
  """No shell expands ~ within --models=NAME=~/DIR."""
  monkeypatch.setenv("HOME", str(models["rnn"].parent))
  assert named(["~/rnn"]) == {"~/rnn": "~/rnn"}
  output = tmp_path / "table.json"
  said = []
  table_1(["RNN=~/rnn"], output, data_dir=questions, limit=1, say=said.append, **TASKS)
  assert said == ["RNN: done."] and json.loads(output.read_text())["models"]["RNN"]["fingerprint"] is not None
  with pytest.raises(ValueError, match="yarn:abc:x: wanted yarn:FACTOR:DIR"):
    tables_1_2._reader("yarn:abc:x")


def test_data_that_are_missing_are_no_models_fault(models, questions, tmp_path):
  given = [str(models["rnn"])]
  with pytest.raises(FileNotFoundError, match="has no data set baber/piqa"):
    table_1(given, tmp_path / "table.json", data_dir=questions, tasks=("piqa",), say=quiet)
  with pytest.raises(FileNotFoundError, match="has no files of qasper"):
    table_2(given, tmp_path / "table.json", data={"qasper": tmp_path})
  with pytest.raises(ValueError, match=r"lengths=\[256, 512\]: wanted a task at least, and lengths above the 256"):
    table_2(given, tmp_path / "table.json", data={"qasper": tmp_path}, lengths=[256, 512])
  assert not list(tmp_path.iterdir())


def test_table_2(models, documents, tmp_path, monkeypatch):
  output, how = tmp_path / "table.json", {"data": {"qasper": documents}, "say": quiet, **ANSWERS}
  given = [f"RNN={models['rnn']}", "hf=hf:google/recurrentgemma-2b", f"Y*=yarn:2:{models['softmax']}"]
  text = table_2(given, output, **how)
  lines = text.splitlines()
  assert lines[0] == "| Qasper, F1, 0-shot | 32 | 64 |" and lines[-1] == "| answers | 2 | 2 |"
  assert [line.split(" | ")[0] for line in lines[2:5]] == ["| RNN", "| Y*", "| **hf**"]
  assert "| **hf** | not run: hf:google/recurrentgemma-2b: wanted a model directory" in text
  kept = json.loads(output.read_text())
  assert kept["models"]["Y*"]["results"]["qasper"]["yarn_factor"] == 2.0
  assert kept["models"]["Y*"]["fingerprint"] and output.with_suffix(".md").read_text() == text

  loads = []
  monkeypatch.setattr(tables_1_2, "load", lambda spec: loads.append(spec) or pytest.fail("asked again"))
  assert table_2([*given[2:], *given[:2]], output, **how) == text and loads == []
  monkeypatch.undo()
  # Killed after the last answer of a model, before its results were written.
  again = output.with_name("again.json")
  again.write_text(json.dumps(kept | {"models": {}}))
  shutil.copytree(tmp_path / "table_parts", tmp_path / "again_parts")
  left = []
  monkeypatch.setattr("supra_jax.evaluation.long_context._all_answers", lambda *how: left.append(how[4]) or [])
  assert lines[2] in table_2(given[:1], again, **how) and left == [set()]


def test_one_answer_has_no_standard_error(models, documents, tmp_path):
  how = {"data": {"qasper": documents}, "limit": 1, "say": quiet, **ANSWERS, "lengths": (2048,), "max_new_tokens": 2}
  text = table_2([str(models["rnn"])], tmp_path / "table.json", **how)
  assert text.splitlines()[2].startswith("| Llama1-7B | 24.4 |") and f"| {models['rnn']} | " in text
  assert table_2([str(models["rnn"])], tmp_path / "table.json", **how) == text
  failed = table_2(["gone"], tmp_path / "other.json", **how)
  assert "| Mistral-SUPRA | 19.4 |" in failed and "| **gone** | not run: gone is not a supra_jax model" in failed


def test_names_of_models(tmp_path):
  (tmp_path / "a=b").mkdir()
  assert named(["A = x", "hf:o/n", f"{tmp_path}/a=b"]) == {
    "A": "x", "hf:o/n": "hf:o/n", f"{tmp_path}/a=b": f"{tmp_path}/a=b"
  }  # fmt: skip
  for wrong, says in (
    ([], "models is empty"),
    (["=x"], "models has '=x'"),
    (["a|b=x"], "without a"),
    (["a=x", "a=y"], "two of the name 'a'"),
  ):
    with pytest.raises(ValueError, match=says):
      named(wrong)
  assert slug("Llama2-7B") == "Llama2-7B" and slug("Llama2-7B*").startswith("Llama2-7B-")
  assert slug("../x").startswith("x-") and slug("///").isalnum()


def test_every_row_of_the_paper_has_a_model_or_a_reason():
  assert [model.table_1 for model in MODELS if model.table_1] == [row[:3] for row in paper.TABLE_1]
  assert {row for model in MODELS for row in model.table_2} == {row[0] for row in paper.TABLE_2}
  labels = [model.label for model in MODELS]
  assert len(set(labels)) == len(labels) and named([f"{label}=x" for label in labels])
  assert all(bool(model.hub) == (model.how != "none") and (model.hub or model.note) for model in MODELS)
  first, second = commands(1), commands(2)
  for model in MODELS:
    for text, rows in (first, model.table_1), (second, model.table_2):
      assert (model.hub in text) if model.hub and rows else True, model
  assert first.count("--table=1") == sum(bool(model.table_1 and model.hub) for model in MODELS)
  assert "--trust_remote_code" in first and "'--models=Llama2-7B*=yarn:4:models/llama2_7b'" in second
  with pytest.raises(ValueError, match="table=3: wanted 1 or 2"):
    commands(3)
