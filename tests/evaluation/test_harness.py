"""Our model in lm-evaluation-harness: what lm-eval's own `hf` model answers with the same weights, and whole tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from lm_eval.api.instance import Instance

import supra_jax
from convert_weights.orbax_to_hf import convert
from supra_jax.evaluation import paper
from supra_jax.evaluation.comparison import compare, loader, task_names
from supra_jax.evaluation.harness import HarnessLM
from supra_jax.evaluation.local_data import read
from supra_jax.evaluation.tasks import Exam, evaluate_tasks, report
from supra_jax.experiments import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "softmax")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Data sets in the ways that people have them: as the hub has them, in a file of one line each, and shortened."""
  directory = tmp_path_factory.mktemp("data")

  def write(name, rows):
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

  scene = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a.", "b.", "c.", "d."]}
  scenes = [scene | {"label": str(i % 4), "ctx_a": f"A man sits{' on' * i}."} for i in range(6)]
  write("Rowan/hellaswag/validation.jsonl", scenes)
  sentence = {"sentence": "Sarah met Sandra since _ was there.", "option1": "Sarah", "option2": "Sandra"}
  write("winogrande/winogrande_xl/validation.jsonl", [sentence | {"answer": str(1 + i % 2)} for i in range(4)])
  choices = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
  asked = {"id": "x", "question": "How many?", "choices": choices, "answerKey": "B"}
  write("arc_easy/test.jsonl", [asked] * 3)
  subject = {"question": "Which bone?", "subject": "anatomy", "choices": ["a", "b", "c", "d"]}
  for split, count in (("dev", 5), ("test", 4)):
    write(f"mmlu/{split}/anatomy.jsonl", [subject | {"answer": i % 4, "question": f"Bone {i}?"} for i in range(count)])
  return directory


def _instances(kind, arguments):
  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_answers_of_lm_evals_own_model(directory, tmp_path):
  pytest.importorskip("torch")
  huggingface = pytest.importorskip("lm_eval.models.huggingface")
  convert(directory, tmp_path / "hf")
  ours = HarnessLM(str(directory), max_length=40, progress=False)
  from transformers import AutoTokenizer

  begin = ours.lm.tokenizer.decode([ours.prefix_token_id], keep_special=True)
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", bos_token=begin, eos_token=begin, add_bos_token=False)
  how = {"tokenizer": tokenizer, "device": "cpu", "batch_size": 2, "max_length": 40, "dtype": "float32"}
  theirs = huggingface.HFLM(str(tmp_path / "hf"), **how)
  assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
  # lm-eval's `hf` scores the wrong positions where two windows have the same tokens: the text does not repeat itself.
  long = " ".join(f"The name {i} of the rose" for i in range(20))
  pairs = [
    ("The name", " of"),
    ("The name ", "of the"),
    ("", "The rose"),
    (long, "and"),
    ("A\n\n", " x"),
    ("The name", " a rose"),
  ]
  texts = [(text,) for text in ("The", "The name of the rose", long)]
  for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts)):
    got, want = (getattr(lm, kind)(_instances(kind, arguments)) for lm in (ours, theirs))
    if kind == "loglikelihood":
      assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
      got, want = ([score for score, _ in answers] for answers in (got, want))
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)
  how = [
    {"until": ["\n"], "max_gen_toks": 8},
    {"until": " ", "max_gen_toks": 5, "temperature": 0.0},
    {"max_gen_toks": 9},
  ]
  prompts = [(text, dict(one)) for one in how for text in ("The name", long)]
  got, want = (lm.generate_until(_instances("generate_until", prompts)) for lm in (ours, theirs))
  assert got == want
  with pytest.raises(ValueError, match="generation_kwargs has num_beams: known are"):
    ours.generate_until(_instances("generate_until", [("The", {"num_beams": 4})]))


def test_data_sets_of_every_form(data):
  assert read(data, "Rowan/hellaswag")["validation"]["label"][:2] == ["0", "1"]
  assert read(data, "allenai/winogrande", "winogrande_xl")["validation"].num_rows == 4
  assert read(data, "allenai/ai2_arc", "ARC-Easy")["test"][0]["answerKey"] == "B"
  mmlu = read(data, "cais/mmlu", "anatomy")
  assert mmlu["dev"].num_rows == 5 and mmlu["test"].num_rows == 4 and mmlu["train"].num_rows == 0
  with pytest.raises(FileNotFoundError, match="has no data set baber/piqa: wanted"):
    read(data, "baber/piqa")


def test_shortened_rows_give_the_same_questions(tmp_path):
  """The columns that other collections keep, as the hub's: the texts that lm-eval makes of them are the same."""
  rows = {
    "hellaswag": {"query": "Roof: A man sits. He", "choices": ["a.", "b.", "c.", "d."], "gold": 2},
    "winogrande": {
      "context_options": ["Sarah met Sandra so Sarah", "Sarah met Sandra so Sandra"], "continuation": "left.", "gold": 1
    },
  }  # fmt: skip
  for name, row in rows.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "validation.json").write_text(json.dumps([row]))
  scene = read(tmp_path, "Rowan/hellaswag")["validation"][0]
  assert (scene["activity_label"], scene["ctx_a"], scene["endings"][2], scene["label"]) == (
    "Roof",
    "A man sits. He",
    "c.",
    "2",
  )
  asked = read(tmp_path, "allenai/winogrande", "winogrande_xl")["validation"][0]
  for option, text in zip(("option1", "option2"), rows["winogrande"]["context_options"], strict=True):
    assert asked["sentence"] == asked["sentence"].partition("_")[0] + "_ left."
    assert asked["sentence"].partition("_")[0] + asked[option] == text
  assert asked["answer"] == "2"


def test_tasks_from_the_first_question_to_the_table(directory, data, tmp_path, monkeypatch):
  lm = supra_jax.load(directory)
  exam = Exam(task_names(["hellaswag", "winogrande", "arc_easy", "mmlu_anatomy"]), data_dir=data, log_samples=True)
  results = evaluate_tasks(lm, exam)
  assert results["n-shot"] == {"hellaswag": 0, "winogrande": 0, "arc_easy": 0, "mmlu_anatomy": 5}
  asked = results["samples"]["hellaswag"][0]
  assert asked["arguments"][0] == ("Roof: A man sits. He", " a.")
  scores = [score for ((score, _),) in asked["resps"]]
  ids = [lm.tokenizer.encode(text) for text in ("Roof: A man sits. He", "Roof: A man sits. He a.")]
  logits = np.asarray(lm([ids[1][:-1]])[0][0], np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  assert scores[0] == pytest.approx(sum(logits[i - 1, ids[1][i]] for i in range(len(ids[0]), len(ids[1]))), abs=1e-4)

  # Cut off after some answers, and called again: the answers that are kept are not read again.
  output = tmp_path / "out.json"
  with monkeypatch.context() as patch:
    from supra_jax.evaluation import scoring

    settle = scoring._Run.settle

    def cut_off(run, most):
      settle(run, most)
      if run._left.count(0) > 4:
        raise KeyboardInterrupt

    patch.setattr(scoring._Run, "settle", cut_off)
    patch.setattr(scoring, "BATCH_TOKENS", {"cpu": 64})
    with pytest.raises(KeyboardInterrupt):
      compare({"model": lambda: lm}, exam, output)
  assert not output.exists() and list(tmp_path.glob("out.json.*.kept"))
  text = compare({"model": lambda: lm, "again": lambda: lm}, exam, output)
  assert not list(tmp_path.glob("out.json.*")) and (tmp_path / "out.png").stat().st_size > 5000
  written = json.loads(output.read_text())
  assert written["model"]["results"] == written["again"]["results"]
  assert written["model"]["results"]["hellaswag"]["acc,none"] == results["results"]["hellaswag"]["acc,none"]
  assert written["model"]["tokens"]["asked"] < results["tokens"]["asked"]
  assert "| Mistral-SUPRA | 7B | +100 | 77.1 | 80.4 | 70.3 | 75.9 | 45.8 | 34.2 | 64.0 |" in text
  assert f"| arc_easy | acc | {100 * results['results']['arc_easy']['acc,none']:.2f} ±" in text

  chosen = evaluate_tasks(lm, Exam(("hellaswag",), data_dir=data, log_samples=True, samples={"hellaswag": [4, 1]}))
  scored = {sample["doc_id"]: sample["filtered_resps"] for sample in chosen["samples"]["hellaswag"]}
  assert sorted(scored) == [1, 4]
  for i, answers in scored.items():
    of_all = [score for score, _ in results["samples"]["hellaswag"][i]["filtered_resps"]]
    np.testing.assert_allclose([score for score, _ in answers], of_all, atol=1e-4)
  for wrong, says in [
    ({"hellaswag": [6]}, "question 6 of hellaswag"),
    ({"piqa": [0]}, "piqa, which is no task that is asked"),
  ]:
    with pytest.raises(ValueError, match=says):
      evaluate_tasks(lm, Exam(("hellaswag",), data_dir=data, samples=wrong))
  with pytest.raises(ValueError, match="lm-eval has no task 'helaswag'"):
    evaluate_tasks(lm, Exam(("helaswag",), data_dir=data))
  with pytest.raises(ValueError, match="hellaswag wants 2 examples, and there is no data"):
    evaluate_tasks(lm, Exam(("hellaswag",), fewshot=2, data_dir=data))


def test_recall_from_pages(directory, tmp_path):
  """SWDE, FDA and SQuAD completion, whose answers are generated, from rows with the columns of the hub's data sets."""
  lm = supra_jax.load(directory)
  # Task -> (folder of its data, most tokens of an answer, what ends it).
  tasks = {
    "swde": ("based-swde-v2", 48, "\n"),
    "fda": ("based-fda", 48, "\n"),
    "squad_completion": ("based-squad", 256, "\n\n"),
  }
  texts = [f"The name {i} of the rose" for i in range(3)]
  # The first row's value is in what the model says, the others' are not.
  said = lm.generate(texts, max_new_tokens=48, stop="\n", temperature=0.0)[0]
  values = [said.strip()[2:6], "not there", "nor there"]
  for folder, _, _ in tasks.values():
    (tmp_path / folder).mkdir()
    rows = [{"doc_id": str(i), "text": f"{t} ", "value": v} for i, (t, v) in enumerate(zip(texts, values, strict=True))]
    (tmp_path / folder / "validation.json").write_text(json.dumps(rows))
  results = evaluate_tasks(lm, Exam(tuple(tasks), data_dir=tmp_path, log_samples=True))
  for task, (_, tokens, stop) in tasks.items():
    answers = lm.generate(texts, max_new_tokens=tokens, stop=stop, temperature=0.0)
    assert [sample["resps"][0][0] for sample in results["samples"][task]] == answers
    assert results["results"][task]["contains,none"] == pytest.approx(1 / 3)


def test_the_report_of_other_metrics():
  """Bits are no share, answers of two filters are two lines, and a table of a sample says so."""
  tasks = {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0, "alias": "gsm8k"}}
  results = {
    bits: {"results": tasks | {"wikitext": {"bits_per_byte,none": bits}}, "seconds": 1} for bits in (0.72, 1.08)
  }
  text = report({str(bits): found for bits, found in results.items()})
  assert "| wikitext | bits_per_byte | 0.72 | 1.08 |" in text
  assert "| gsm8k | exact_match (flexible-extract) | 100.00 | 100.00 |" in text
  sample = {"results": {"piqa": {"acc_norm,none": 0.5}}, "seconds": 1, "config": {"limit": 3}}
  assert "The last row is of 3 questions of each task, the paper's of all." in report({"m": sample})


@pytest.mark.parametrize("name", ["", ".", "x.md", "x.png"])
def test_outputs_that_cannot_be_written_are_refused_first(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="wanted the name of a JSON file"):
    compare({"model": lambda: pytest.fail("asked")}, Exam(("piqa",)), name)
  assert not list(tmp_path.iterdir())


def test_models_to_compare_with_are_looked_for_first(tmp_path):
  for spec in (f"{tmp_path}/none", f"hf:{tmp_path}/none", "hf:"):
    with pytest.raises(FileNotFoundError, match=f"--compare={spec}"):
      loader(spec)


def test_averages_of_the_papers_table():
  """As the paper prints them; two of its averages are rounded down from a half."""
  printed = [59.2, 62.5, 61.9, 53.0, 50.8, 56.3, 65.4, 72.2, 72.4, None, 60.3, 63.5, 64.7, 58.6, 61.2, 64.0]
  for (*_, scores), average in zip(paper.TABLE_1, printed, strict=True):
    found = paper.average(scores)
    assert found == average is None or found == pytest.approx(average, abs=0.0501)


def test_table_2_at_the_lengths_that_were_read():
  cells = paper.table_2("narrativeqa", [512, 8192])
  assert cells["Mistral-SUPRA"] == ["", "17.8"] and cells["Llama2-7B*"] == ["", "23.0"]
  assert paper.table_2("qasper", [512]) == {}
