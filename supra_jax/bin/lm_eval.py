"""lm-eval's own command line, which knows our models: `python -m supra_jax.bin.lm_eval --model supra_jax ...`.

    python -m supra_jax.bin.lm_eval --model supra_jax --model_args checkpoint=DIR --tasks hellaswag

Arguments of the model are those of `evaluation.harness.HarnessLM`: dtype, quantize, mesh=fsdp:4+tensor:2, max_length.
"""

from __future__ import annotations

import sys

from supra_jax.bin.quiet import silence
from supra_jax.core.programs import keep_programs


def main() -> None:
  try:
    from lm_eval.__main__ import cli_evaluate

    import supra_jax.evaluation.harness  # noqa: F401  # registers the model
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install 'supra_jax[eval]'.")
  silence()
  keep_programs()
  cli_evaluate()


if __name__ == "__main__":
  main()
