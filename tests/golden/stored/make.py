"""Makes the stored cases, at the commit whose files they are to stand for.

git worktree add OLD 8d74590 && cd OLD && PYTHONPATH=. python make.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
from supra_jax.checkpoint import load_model
from supra_jax.config import SupraConfig

import supra_jax
from tests import runs, tiny

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
SOFTMAX_FIRST = ("softmax", "supra", "supra", "softmax")
MODELS = {
  "softmax": ("softmax", {"sliding_window": 12, "qk_norm": "head"}),
  "supra": ("supra", {"supra": SupraConfig(qk_norm=True, decay="retnet")}),
  "supra_per_head": ("supra", {"supra": SupraConfig(feature_map="per_head_separate", decay_start=0.5)}),
  "window": ("supra_window", {"supra": SupraConfig(window=8, sinks=2), "max_positions": 64}),
  "hybrid": ("supra", {"mixers": ("softmax", "supra", "supra_window", "supra_window")}),
}
# name: (model, mesh, changes); each is stopped after step 2.
RUNS = {
  "new_weights": ("supra", "", {"num_steps": 6, "new_weights_steps": 4, "new_weights_rate": 0.5, "microbatches": 2}),
  "adapters": ("window", "", {"num_steps": 4, "adapters": {"rank": 2, "kernels": "self_attn/[qkvo]_proj/"}}),
  "bfloat16_moments": ("hybrid", "", {"num_steps": 4, "optimizer": {"moment_dtype": "bfloat16"}, "dtype": "bfloat16"}),
  "transfer": ("window", "", {"num_steps": 4, "transfer_steps": 3, "distill_from": "models/teacher"}),
  "packed": (
    "hybrid",
    "",
    {"num_steps": 4, "data": {"input": "", "sources": "packed/train", "heldout": "packed/heldout"}},
  ),
  "mesh": ("hybrid", "fsdp:2,tensor:2", {"num_steps": 4}),
}


def main() -> None:
  target = Path(sys.argv[1]).absolute()
  work = target / "work"
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  os.environ["PYTHONPATH"] = str(runs.ROOT)
  runs.ROOT = work  # where the programs run, so that paths in their files are relative
  os.chdir(work)
  tiny.write_text(Path("text.jsonl"))
  models = {**MODELS, "teacher": ("softmax", {})}
  tokens = np.random.default_rng(0).integers(1, 320, (2, 40)).astype(np.int32)
  logits = {"tokens": tokens}
  for name, (mixer, changes) in models.items():
    tiny.write_checkpoint(Path("models") / name, mixer, seed=len(logits), **SMALL, **changes)
    logits[name] = np.asarray(supra_jax.load(f"models/{name}")(tokens)[0])
  np.savez_compressed(target / "logits.npz", **logits)
  flags = "--input=text.jsonl --tokenizer=models/hybrid --output=packed --sequence_length=32 --heldout_every=6"
  assert os.system(f"{sys.executable} -m supra_jax.bin.prepare_data {flags} --documents=separate --workers=0") == 0

  expected = {}
  for name, (model, mesh, changes) in RUNS.items():
    data = changes.pop("data", {"input": "text.jsonl"}) | {"sequence_length": 32}
    config = {"log_every": 1, "save_every": 2, "keep_checkpoints": 9, "mesh": mesh, **changes}
    if "adapters" in config:
      from supra_jax.adapters import AdapterConfig

      config["adapters"] = AdapterConfig(**config["adapters"])
    made = runs.make_config(f"models/{model}", "text.jsonl", data=data, **config)
    workdir = Path("runs") / name
    runs.Run(made, workdir, devices=4 if mesh else 1).finish()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    expected[name] = {
      "losses": {
        r["step"]: r.get("loss", r.get("attention_error")) for r in map(json.loads, lines) if "learning_rate" in r
      },
      "heldout": [r["heldout_nll"] for r in map(json.loads, lines) if "heldout_nll" in r],
    }
    params = load_model(workdir / "checkpoint").params
    flat = {"/".join(k.key for k in path): np.asarray(x) for path, x in jax_leaves(params)}
    np.savez_compressed(target / f"{name}.npz", **flat)
    # As it was after step 2.
    for gone in ["checkpoint", "loss.png", "tensorboard", *(f"training/{step}" for step in (4, 6))]:
      path = workdir / gone
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 2))
  (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
  with tarfile.open(target / "files.tar.xz", "w:xz") as archive:
    archive.add(".", "stored")


def jax_leaves(tree):
  import jax

  return jax.tree_util.tree_leaves_with_path(tree)


if __name__ == "__main__":
  main()
