"""The flags of `evaluate` for tasks of lm-evaluation-harness, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from supra_jax.inference.lm import LM

flags.disclaim_key_flags()  # --help of each program lists them as its own
_TASKS = (
  "Tasks of lm-evaluation-harness, as in hellaswag,piqa,winogrande,arc_easy,arc_challenge,mmlu, the paper's table 1, "
  "for which table1 stands too."
)
_DATA = "Directory of the tasks' data sets, see evaluation/local_data.py. Default: the Hugging Face hub."
_SAMPLES = 'JSON file of the questions to ask, by index: {"piqa": [0, 7], ...}. Default: all.'
_COMPARE = "Further models to ask the same: model directories, and hf:NAME for models of transformers."


def define() -> Callable[[Callable[[], LM], str | None, str | None], bool]:
  """Defines the flags.

  Returns:
    A function (load, name, output) -> whether there are tasks; it runs them on the model that `load` returns, whose
    name is `name`, and on those of --compare, prints tables, and writes `output`, a JSON file, and a plot beside it.
  """
  tasks = flags.DEFINE_list("tasks", [], _TASKS)
  fewshot = flags.DEFINE_integer("fewshot", None, "Examples before a question. Default: 5 for mmlu, else 0.", 0)
  limit = flags.DEFINE_integer("limit", None, "Questions of each task. Default: all.", 1)
  data_dir = flags.DEFINE_string("data_dir", None, _DATA)
  fetch_only = flags.DEFINE_bool("fetch_only", False, "Only load the tasks' data sets, on a node with network, say.")
  chat = flags.DEFINE_bool("chat", False, "Whether prompts of tasks go through the model's chat template.")
  log_samples = flags.DEFINE_bool("log_samples", False, "Whether --output has every question with its log-likelihoods.")
  samples = flags.DEFINE_string("samples", None, _SAMPLES)
  compare = flags.DEFINE_list("compare", [], _COMPARE)
  trust = flags.DEFINE_bool("trust_remote_code", False, "Whether models of hf: may run code that comes with them.")

  def run(load: Callable[[], LM], name: str | None, output: str | None) -> bool:
    if not tasks.value:
      return False
    if "recall" in tasks.value:
      raise ValueError(f"recall wants its teacher: python -m supra_jax.bin.recall --checkpoint={name} --teacher=DIR.")
    try:
      from supra_jax.evaluation import comparison
    except ModuleNotFoundError as error:
      raise ValueError(f"{error.name} is not installed, which tasks want: pip install 'supra_jax[eval]'.") from error
    chosen = comparison.read_samples(samples.value) if samples.value else None
    how = fewshot.value, limit.value, data_dir.value, chat.value, log_samples.value, chosen
    exam = comparison.Exam(comparison.task_names(tasks.value), *how)
    if fetch_only.value:
      print(comparison.fetched(exam))
      return True
    models = {str(name): load} | {spec: comparison.loader(spec, trust.value) for spec in compare.value}
    print(comparison.compare(models, exam, output))
    return True

  return run
