"""Answers about long documents: the prompt, its cut, what is scored, and a run that goes on."""

import json
import math
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

import supra_jax
from supra_jax.evaluation import long_context
from supra_jax.evaluation.long_context import answer_questions, examples, with_yarn
from supra_jax.evaluation.questions import Question
from supra_jax.experiments import tiny
from supra_jax.model.registry import layer
from tests.convert_weights.tiny_checkpoints import GOLDEN, copy_case, read
from tests.evaluation.test_questions import annotation, paper
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = 6
DOCUMENTS = [topics[name][:100] for name in ("assert", "for")]
QUESTIONS = [
  Question("1", DOCUMENTS[0], "What is it for?", ("debugging", "it is for debugging"), ("extractive", "abstractive")),
  Question("2", DOCUMENTS[0], "Is it a statement, as the others are?", ("Yes", "no"), ("boolean", "boolean")),
  Question("3", DOCUMENTS[0], "Who?", ("Unanswerable",), ("none",)),
  Question("4", DOCUMENTS[1], "What does it iterate over?", ("a sequence",), ("extractive",)),
]
LENGTHS = (40, 300)  # of which the first cuts all prompts and the second none


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
  """A ring and a linear state, which need few programs."""
  mixer = layer("supra_window", window=16)
  return supra_jax.load(tiny.write_checkpoint(tmp_path_factory.mktemp("m") / "m", "supra", layers=(mixer,)))


def one_by_one(lm, question, length):
  """The answer to a question from a prompt of its own, read without a state that others share."""
  group = [other for other in QUESTIONS if other.document == question.document]
  prompts = {q.id: lm.tokenizer.encode(f"{q.document}\n\nQuestion: {q.text}\nAnswer:") for q in group}
  cut = max(max(len(ids) for ids in prompts.values()) - (length - NEW), 0)
  ids = prompts[question.id][cut:]
  if question.id == "2":
    chances = {}
    for word in ("yes", "no"):
      more = lm.tokenizer.encode(f" {word}", continues=True)
      logp = np.asarray(jax.nn.log_softmax(lm([[*ids, *more]])[0][0]))
      chances[word] = sum(logp[len(ids) + i - 1, token] for i, token in enumerate(more))
    return max(chances, key=chances.get)
  return lm.complete([ids], max_new_tokens=NEW, stop="\n")[0].text.strip()


def test_answers_are_those_of_each_prompt_alone(lm, tmp_path):
  results = answer_questions(lm, "qasper", QUESTIONS, LENGTHS, tmp_path, max_new_tokens=NEW)
  rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
  assert len(rows) == 8
  for row in rows:
    question = QUESTIONS[int(row["id"]) - 1]
    assert row["answer"] == one_by_one(lm, question, row["length"]), row
    assert row["question"] == question.text
  assert {tuple(results["lengths"][n]["f1_by_kind"]) for n in LENGTHS} <= {
    ("abstractive", "boolean", "extractive", "none"), ("boolean", "extractive", "none")
  }  # fmt: skip
  for n in LENGTHS:
    f1 = [100 * row["f1"] for row in rows if row["length"] == n]
    assert results["lengths"][n]["answers"] == 4 and results["lengths"][n]["f1"] == pytest.approx(np.mean(f1))
    assert results["lengths"][n]["f1_stderr"] == pytest.approx(np.std(f1, ddof=1) / 2)
  assert (tmp_path / "table.md").read_text() == long_context.table(results)


def test_a_run_goes_on(lm, tmp_path):
  how = {"max_new_tokens": NEW, "settings": {"model": "a"}}
  whole = answer_questions(lm, "qasper", QUESTIONS, LENGTHS, tmp_path / "whole", **how)
  answer_questions(lm, "qasper", QUESTIONS, LENGTHS[:1], tmp_path / "two", limit=3, **how)
  answers = tmp_path / "two" / "answers.jsonl"
  first = answers.read_bytes()
  for left in (first[:5], first[:-7]):  # killed in the first line, and in the last
    answers.write_bytes(left)
    assert answer_questions(lm, "qasper", QUESTIONS, LENGTHS, tmp_path / "two", **how) == whole
    lines = [path.read_text().splitlines() for path in (answers, tmp_path / "whole" / "answers.jsonl")]
    assert sorted(lines[0]) == sorted(lines[1]) and answers.read_bytes().startswith(left.rpartition(b"\n")[0])
  with pytest.raises(ValueError, match=r"two holds answers for max_new_tokens=6, not 7"):
    answer_questions(lm, "qasper", QUESTIONS, LENGTHS, tmp_path / "two", max_new_tokens=7, settings={"model": "a"})
  with pytest.raises(ValueError, match=r"holds answers for model='a', not 'b'"):
    answer_questions(lm, "qasper", QUESTIONS, LENGTHS, tmp_path / "two", max_new_tokens=NEW, settings={"model": "b"})


def test_scores():
  score = long_context.score
  assert score("qasper", QUESTIONS[2], " \n") == {"f1": 1.0, "kind": "none"}  # says nothing: unanswerable
  assert score("qasper", QUESTIONS[0], "it is for debugging.") == {"f1": 1.0, "kind": "abstractive"}
  assert score("qasper", QUESTIONS[0], "for debugging") == {"f1": pytest.approx(2 / 3), "kind": "extractive"}
  pytest.importorskip("rouge_score")
  story = Question("1", "text", "Who?", ("the old man", "a man"))
  assert score("narrativeqa", story, "the man old")["rouge_l"] == pytest.approx(2 / 3)
  assert score("narrativeqa", story, "the man old")["f1"] == 1.0  # it knows no order
  assert score("narrativeqa", story, "")["f1"] == 0


def test_examples_are_drawn_once_and_answered():
  said = examples(QUESTIONS, 2)
  assert said == examples(QUESTIONS, 2) and said.endswith("\n\n") and said.count("\nAnswer: ") == 2
  assert examples(QUESTIONS[2:3], 1) == f"{DOCUMENTS[0]}\n\nQuestion: Who?\nAnswer: Unanswerable\n\n"
  assert examples([], 0) == ""
  with pytest.raises(ValueError, match="2 examples are wanted, and there are 1"):
    examples(QUESTIONS[:1], 2)


def test_yarn_is_that_of_transformers(tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
  directory = copy_case("llama_gqa_tied", tmp_path / "yarn", rope_parameters=rope)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
  tokens = np.random.default_rng(0).integers(0, 97, (1, 100))
  plain = read(GOLDEN / "llama_gqa_tied")
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(with_yarn(plain, 4.0, 32)(tokens)[0], want, atol=1e-4)
  assert np.abs(plain(tokens)[0] - want).max() > 1e-2
  assert with_yarn(plain, 4.0).config.rope.original_max_positions == plain.config.max_positions == 128
  with pytest.raises(ValueError, match="YaRN stretches rotary embeddings without scaling"):
    with_yarn(with_yarn(plain, 4.0), 4.0)


def test_the_program(tmp_path):
  checkpoint = tiny.write_checkpoint(tmp_path / "model", "supra", layers=(layer("softmax"),), max_positions=64)
  asked = {"q1": ("What?", [annotation(spans=["a lexicon"])]), "q2": ("Is it?", [annotation(yes_no=True)])}
  (tmp_path / "data").mkdir()
  for split in ("train", "dev"):
    (tmp_path / "data" / f"qasper-{split}-v0.3.json").write_text(json.dumps({"1": paper(split, asked)}))
  command = [f"--checkpoint={checkpoint}", f"--data={tmp_path / 'data'}", "--task=qasper", "--max_new_tokens=4"]
  command += ["--lengths=32,64", "--yarn_factor=4", f"--output={tmp_path / 'out'}"]
  ran = programs.run("supra_jax.bin.long_context", *command)
  assert ran.returncode == 0, ran.stderr
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert results["shots"] == 2 and results["yarn_original"] == 64 and list(results["lengths"]) == ["32", "64"]
  assert ran.stdout.startswith("| Qasper, F1, 2-shot | 32 | 64 |\n| --- | --- | --- |\n")
  assert f"| {checkpoint}, YaRN 4 | " in ran.stdout and ran.stdout.endswith("| answers | 2 | 2 |\n")
  assert "4/4 answers" in ran.stderr and math.isfinite(results["lengths"]["32"]["f1"])
  again = programs.run("supra_jax.bin.long_context", *command, "--shots=0")
  assert again.returncode == 1 and "holds answers for data=" in again.stderr
