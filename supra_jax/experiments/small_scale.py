"""The small scale of the paper's experiments: its text, its tokenizer, and its teacher, which train on two cores.

WORKDIR/tokenizer.json  a tokenizer of 4,096 tokens, trained on the text
WORKDIR/text            the text, packed in rows of 512
WORKDIR/repeats.jsonl   documents in which a span of random words stands twice; WORKDIR/repeats has them packed alike
WORKDIR/scratch/NAME    models as they are drawn
WORKDIR/teacher         the run of the teacher, a transformer of 3 million parameters; `checkpoint` in it is the model

The spans that stand twice are there for induction heads: so small a transformer does not learn them from text alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from supra_jax.core.files import into_place
from supra_jax.core.plain_json import to_json
from supra_jax.data.packing import prepare
from supra_jax.data.text import documents_in_turns
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.experiments.scratch import config_of, draw
from supra_jax.model.presets import two_cores
from supra_jax.model.registry import MixerConfig
from supra_jax.storage.model_directory import save_model
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.optimizer import OptimizerConfig
from supra_jax.training.workdir import TrainSummary

LENGTH, ROWS = 512, 16  # tokens of a row, rows of a batch
TOKENS_A_STEP = LENGTH * ROWS
REPEATS = 0.08  # share of the rows
REPEATED_DOCUMENTS = 12_000
LEARNING_RATE, END_RATE = 3e-3, 3e-5
EVALUATIONS = 10


@dataclasses.dataclass(frozen=True)
class SmallScale:
  """Text and tokenizer of the small scale, made in a directory of its own.

  Attributes:
    workdir: the directory.
    tokenizer_files: name -> contents of the tokenizer's files.
    data: the text and the repeated spans as a run reads them.
  """

  workdir: Path
  tokenizer_files: dict[str, bytes]
  data: DataConfig

  @property
  def tokenizer(self) -> Tokenizer:
    return _tokenizer(self.tokenizer_files)

  def drawn(self, name: str, mixer: str | MixerConfig, seed: int = 0) -> Path:
    """Draws a model from scratch, unless an earlier call did, and returns its directory, `scratch/NAME`."""
    directory = self.workdir / "scratch" / name
    if not directory.exists():
      config = config_of("two_cores", mixer, self.tokenizer)
      source = {"drawn": {"preset": "two_cores", "seed": seed}}
      params = draw(config, seed)
      save_model(directory, config=config, params=params, tokenizer_files=self.tokenizer_files, source=source)
    return directory

  def recipe(self, start: Path, tokens: int, *, seed: int = 0, learning_rate: float = LEARNING_RATE) -> TrainConfig:
    """Returns the recipe of a run: AdamW, a twentieth of the steps is warmup, then a cosine.

    Args:
      start: model directory to start from.
      tokens: number of tokens to train on; the run has the nearest number of whole steps.
      seed: seed of the order of the data.
      learning_rate: peak learning rate; the cosine ends at a hundredth of it.
    """
    steps = max(round(tokens / TOKENS_A_STEP), 1)
    optimizer = OptimizerConfig(
      learning_rate=learning_rate, end_learning_rate=learning_rate / 100, warmup_steps=max(steps // 20, 1)
    )
    return TrainConfig(
      init_checkpoint=str(start),
      data=self.data,
      batch_size=ROWS,
      num_steps=steps,
      optimizer=optimizer,
      remat="none",
      log_every=min(10, steps),
      evaluate_every=-(-steps // EVALUATIONS),
      save_every=-(-steps // EVALUATIONS),
      keep_checkpoints=1,
      seed=seed,
    )

  def teacher(self, tokens: int) -> tuple[Path, TrainSummary]:
    """Trains the teacher, or resumes its training; returns (its model directory, what training says of it)."""
    run = self.workdir / "teacher"
    summary = train(self.recipe(self.drawn("softmax", "softmax"), tokens), run)
    return run / "checkpoint", summary


def small_scale(input: str, workdir: Path) -> SmallScale:
  """Makes text and tokenizer of the small scale, or resumes a call that was killed.

  Args:
    input: text, as `prepare_data` takes it.
    workdir: local directory that everything is written to.

  Raises:
    ValueError, OSError: the text cannot be read or packed.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  vocabulary, repeats = workdir / "tokenizer.json", workdir / "repeats.jsonl"
  if not vocabulary.exists():
    with into_place(vocabulary) as file:
      file.write_bytes(tiny.byte_bpe(_first(input, 20 * 10**6), two_cores().vocab_size))
  if not repeats.exists():
    with into_place(repeats) as file, file.open("w") as lines:
      for text in itertools.islice(repeated_spans(input), REPEATED_DOCUMENTS):
        lines.write(to_json({"text": text}) + "\n")
  files = {"tokenizer.json": vocabulary.read_bytes(), "tokenizer_config.json": b"{}"}
  for name, texts in (("text", input), ("repeats", str(repeats))):
    prepare(
      texts,
      _tokenizer(files),
      workdir / name,
      vocab_size=two_cores().vocab_size,
      sequence_length=LENGTH,
      heldout_every=50,
    )
  data = DataConfig(
    sources=f"{workdir / 'text/train'}:{1 - REPEATS},{workdir / 'repeats/train'}:{REPEATS}",
    heldout=str(workdir / "text/heldout"),
    heldout_rows=128,
    sequence_length=LENGTH,
  )
  return SmallScale(workdir, files, data)


def repeated_spans(input: str, *, words: int = 60, seed: int = 0) -> Iterator[str]:
  """Yields documents made of each document of a text: 20 to `words` of its words at random, some of its text, and the
  same words once more. Only who looks them up can know the second ones.

  Args:
    input: text, as `prepare_data` takes it; documents of fewer than 1,000 words are left out.
    words: largest number of words of a span; the text between is at most twice as long.
    seed: seeds what is drawn.
  """
  rng = np.random.default_rng(seed)
  while True:  # a small text is used more than once
    found = False
    for document in documents_in_turns(input):
      if len(text := document[: 2**20].split()) < 1000:
        continue
      found = True
      for _ in range(8):
        span = " ".join(rng.choice(text, int(rng.integers(20, words + 1))))
        start = int(rng.integers(len(text)))
        between = " ".join(text[start : start + int(rng.integers(2 * words))])
        yield f"{span}\n{between}\n{span}"
    if not found:
      raise ValueError(f"{input}: no document of 1,000 words, of which repeated spans are made.")


def _first(input: str, characters: int) -> Iterator[str]:
  """Yields the first texts of all files in turn, of so many characters together."""
  for text in documents_in_turns(input):
    yield text
    characters -= len(text)
    if characters <= 0:
      return


def _tokenizer(files: dict[str, bytes]) -> Tokenizer:
  tokenizer = Tokenizer.from_files(files, two_cores())
  assert tokenizer is not None
  return tokenizer
