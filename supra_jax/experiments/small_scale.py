"""The small scale of the paper's experiments: its text, its tokenizer and its teacher, which train on two cores.

WORKDIR/about.json      how large all is, and the teacher if it was given; a call with others is refused
WORKDIR/tokenizer.json  a tokenizer of 4,096 tokens, trained on the text
WORKDIR/text            the text, packed in rows of 512
WORKDIR/repeats.jsonl   documents in which a span of random words stands twice; WORKDIR/repeats has them packed alike
WORKDIR/periods.jsonl   documents of one span of random words over and over, in WORKDIR/periods
WORKDIR/scratch/NAME    models as they are drawn
WORKDIR/teacher         the run of the teacher, a transformer of 3 million parameters, on text and repeats
WORKDIR/teacher_heads   its second run, on text and periods
WORKDIR/teacher_text    its third run, as the first; `checkpoint` in it is the model
WORKDIR/*_cpu_seconds.json  processor time of each of the three

So small a transformer learns no induction heads from text, nor from spans that stand twice: in its second run, in which
nearly every second token can be looked up, it does within a few hundred steps. The third brings back what that cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.files import into_place
from supra_jax.core.plain_json import to_json, write_json
from supra_jax.core.schema import POSITIVE, AtLeast, check
from supra_jax.data.packing import prepare
from supra_jax.data.text import documents_in_turns
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny
from supra_jax.experiments.gathered import earlier
from supra_jax.experiments.scratch import config_of, draw
from supra_jax.inference.lm import LM
from supra_jax.model.presets import PRESETS
from supra_jax.model.registry import MixerConfig
from supra_jax.storage.model_directory import fingerprint, load_model_without_params, save_model
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.optimizer import OptimizerConfig

REPEATS, PERIODS = 0.08, 0.5  # shares of the rows: of all runs, and of the teacher's second run
TEACHER_RUNS = ("teacher", "teacher_heads", "teacher_text")  # one after the other
TIME_FILE = "cpu_seconds.json"
_CHARACTERS = 20 * 10**6  # of the text that the tokenizer is trained on
_Number = Annotated[int, POSITIVE]


@dataclasses.dataclass(frozen=True)
class Size:
  """How large the models and their runs are.

  Attributes:
    preset: shape of the models, of `PRESETS`.
    vocab_size: tokens of the tokenizer.
    length: T, tokens of a row.
    rows: rows of a batch.
    repeated: number of documents with a span that stands twice, and of those with one that stands over and over.
    heldout_every: N; every N-th document is held out.
    heldout_rows: rows to evaluate on.
    teacher, heads: tokens that the teacher's first run trains on, and each of the other two.
    scratch, uptrained: tokens that a run from scratch and from the teacher trains on.
  """

  preset: str = "two_cores"
  vocab_size: Annotated[int, AtLeast(257), "all bytes, and the end of a text"] = 4096
  length: _Number = 512
  rows: _Number = 16
  repeated: _Number = 12_000
  heldout_every: Annotated[int, AtLeast(2)] = 50
  heldout_rows: _Number = 128
  teacher: _Number = 20_000_000
  heads: _Number = 3_300_000
  scratch: _Number = 2_000_000
  uptrained: _Number = 500_000

  def __post_init__(self) -> None:
    check(self, "size")
    if self.preset not in PRESETS:
      raise ValueError(f"size.preset={self.preset!r}: wanted one of {', '.join(PRESETS)}.")


@dataclasses.dataclass(frozen=True)
class SmallScale:
  """Text, tokenizer and teacher of the small scale.

  Attributes:
    workdir: directory of all runs.
    size: how large they are.
    data: the text as a run reads it.
    tokenizer_files: name -> contents of the tokenizer's files.
    given: model directory of a teacher that exists already; None: it is trained.
  """

  workdir: Path
  size: Size
  data: DataConfig
  tokenizer_files: Mapping[str, bytes]
  given: Path | None = None

  def drawn(self, name: str, mixer: str | MixerConfig, seed: int = 0, depth: int = 1) -> Path:
    """Draws a model from scratch, unless an earlier call did, and returns its directory, `scratch/NAME`.

    Args:
      name: name of the model.
      mixer: mixer of all layers.
      seed: seeds the parameters.
      depth: number of layers by that of the preset.
    """
    directory = self.workdir / "scratch" / name
    if not directory.exists():
      shape = {"num_layers": depth * PRESETS[self.size.preset]("softmax").num_layers}
      config = config_of(self.size.preset, mixer, _tokenizer(self.tokenizer_files, self.size), shape)
      source = {"drawn": {"preset": self.size.preset, "seed": seed}}
      params = draw(config, seed)
      save_model(directory, config=config, params=params, tokenizer_files=self.tokenizer_files, source=source)
    return directory

  def recipe(
    self, start: Path, tokens: int, learning_rate: float, seed: int = 0, *, evaluations: int = 5
  ) -> TrainConfig:
    """Returns the recipe of a run: AdamW, a twentieth of the steps is warmup, then a cosine to a hundredth of the rate.

    Args:
      start: model directory to start from.
      tokens: number of tokens to train on; the run has the nearest number of whole steps.
      learning_rate: peak learning rate.
      seed: seed of the order of the data.
      evaluations: number of evaluations after steps; 0: before the first step and after the last.
    """
    steps = max(round(tokens / (self.size.rows * self.size.length)), 1)
    part = -(-steps // (evaluations or 1))
    return TrainConfig(
      init_checkpoint=str(start),
      data=self.data,
      batch_size=self.size.rows,
      num_steps=steps,
      optimizer=OptimizerConfig(
        learning_rate=learning_rate, end_learning_rate=learning_rate / 100, warmup_steps=max(steps // 20, 1)
      ),
      remat="none",
      log_every=min(10, part),
      evaluate_every=part if evaluations else 0,
      save_every=part,
      keep_checkpoints=1,
      seed=seed,
    )

  def teacher(self) -> Path:
    """Returns the teacher's model directory; trains it, or resumes its training, if it is not there yet."""
    if self.given is not None:
      return self.given
    of_heads = f"{self.workdir / 'text/train'}:{1 - PERIODS},{self.workdir / 'periods/train'}:{PERIODS}"
    start, size = self.drawn("softmax", "softmax"), self.size
    how = (
      (self.data.sources, size.teacher, 3e-3),
      (of_heads, size.heads, 2e-3),
      (self.data.sources, size.heads, 1e-3),
    )
    for name, (sources, tokens, rate) in zip(TEACHER_RUNS, how, strict=True):
      recipe = self.recipe(start, tokens, rate, evaluations=10 if name == "teacher" else 5)
      start = self.workdir / name / "checkpoint"
      if not start.exists():
        with processor_time(self.workdir / f"{name}_{TIME_FILE}"):
          train(dataclasses.replace(recipe, data=dataclasses.replace(self.data, sources=sources)), self.workdir / name)
    return start

  def teacher_seconds(self) -> float | None:
    """Returns the processor time of the teacher's runs in seconds; None if it is not known, as of a teacher given."""
    files = [self.workdir / f"{name}_{TIME_FILE}" for name in TEACHER_RUNS]
    return sum(json.loads(file.read_text()) for file in files) if all(file.exists() for file in files) else None


@contextlib.contextmanager
def processor_time(file: Path) -> Iterator[None]:
  """Adds the processor time of a block, seconds of all cores, to the number in a file; not if SIGKILL ends it."""
  began, before = time.process_time(), json.loads(file.read_text()) if file.exists() else 0.0
  try:
    yield
  finally:
    write_json(file, before + time.process_time() - began)


def small_scale(input: str, workdir: Path, size: Size, teacher: Path | None = None) -> SmallScale:
  """Makes text and tokenizer, or resumes a call that was killed.

  Args:
    input: text, as `prepare_data` takes it.
    workdir: local directory that everything is written to.
    size: how large the models and their runs are.
    teacher: model directory of a teacher, whose tokenizer and shape are then those of all models; `text` is all that
      its runs read. None: the small scale's own.

  Raises:
    FileNotFoundError: `teacher` is no model directory.
    ValueError, OSError: the text cannot be read or packed, the teacher has no tokenizer, or `workdir` has runs of
      another size or teacher.
  """
  about = dataclasses.asdict(size) | {"given teacher": None if teacher is None else fingerprint(teacher)}
  write_json(workdir / "about.json", earlier(workdir / "about.json", about, {}, flag="--workdir"))
  if teacher is not None:
    model = load_model_without_params(teacher)
    files: Mapping[str, bytes] = model.tokenizer_files
    tokenizer, rows_below = Tokenizer.from_files(files, model.config), model.config.vocab_size
    if tokenizer is None:
      raise ValueError(f"{teacher} has no tokenizer, which the text is packed with.")
    texts, shares = {"text": input}, {"text": 1.0}
  else:
    files = {"tokenizer.json": _vocabulary(input, workdir, size), "tokenizer_config.json": b"{}"}
    tokenizer, rows_below = _tokenizer(files, size), size.vocab_size
    texts = {"text": input} | {name: str(_made(name, input, workdir, size)) for name in ("repeats", "periods")}
    shares = {"text": 1 - REPEATS, "repeats": REPEATS}
  for name, text in texts.items():
    if name != "text" and (workdir / name).exists():
      continue  # a finished text of our own; its path changes where the directory moves
    how: dict[str, Any] = {
      "vocab_size": rows_below,
      "sequence_length": size.length,
      "heldout_every": size.heldout_every,
    }
    prepare(text, tokenizer, workdir / name, **how)
  data = DataConfig(
    sources=",".join(f"{workdir / name / 'train'}:{share}" for name, share in shares.items()),
    heldout=str(workdir / "text" / "heldout"),
    heldout_rows=size.heldout_rows,
    sequence_length=size.length,
  )
  return SmallScale(workdir, size, data, files, teacher)


def repeated_spans(input: str, *, period: bool = False, seed: int = 0) -> Iterator[str]:
  """Yields documents without end, eight of each document of a text, in which random words of that document stand again.

  Only who looks them up can know them the second time. The span has 20 to 60 words and stands twice, with up to 120
  words of the text as it is between; with `period` it has 8 to 40 words and stands over and over, 300 words at least.

  Args:
    input: text, as `prepare_data` takes it; documents of fewer than 1,000 words are left out.
    period: see above.
    seed: seeds what is drawn.

  Raises:
    ValueError: no document has 1,000 words.
  """
  rng = np.random.default_rng(seed)
  while True:  # a small text is used more than once
    is_short = True
    for document in documents_in_turns(input):
      if len(text := document[: 2**20].split()) < 1000:
        continue
      is_short = False
      for _ in range(8):
        span = " ".join(rng.choice(text, int(rng.integers(8, 41) if period else rng.integers(20, 61))))
        if period:
          yield " ".join([span] * -(-300 // (span.count(" ") + 1)))
          continue
        start = int(rng.integers(len(text)))
        between = " ".join(text[start : start + int(rng.integers(120))])
        yield f"{span}\n{between}\n{span}"
    if is_short:
      raise ValueError(f"{input}: no document has 1,000 words, of which spans that stand twice are drawn.")


def _made(name: str, input: str, workdir: Path, size: Size) -> Path:
  """Returns the path of repeats.jsonl or periods.jsonl, which it writes unless an earlier call did."""
  path = workdir / f"{name}.jsonl"
  if not path.exists():
    with into_place(path) as file, file.open("w") as lines:
      for text in itertools.islice(repeated_spans(input, period=name == "periods"), size.repeated):
        lines.write(to_json({"text": text}) + "\n")
  return path


def _vocabulary(input: str, workdir: Path, size: Size) -> bytes:
  """Returns the contents of tokenizer.json, which it writes unless an earlier call did."""
  path = workdir / "tokenizer.json"
  if not path.exists():
    with into_place(path) as file:
      file.write_bytes(tiny.byte_bpe(_first(input), size.vocab_size))
  return path.read_bytes()


def _first(input: str) -> Iterator[str]:
  """Yields the first texts of all files in turn."""
  left = _CHARACTERS
  for text in documents_in_turns(input):
    yield text
    left -= len(text)
    if left <= 0:
      return


def _tokenizer(files: Mapping[str, bytes], size: Size) -> Tokenizer:
  config = PRESETS[size.preset]("softmax").replace(vocab_size=size.vocab_size, bos_token_id=None, eos_token_ids=(0,))
  tokenizer = Tokenizer.from_files(files, config)
  assert tokenizer is not None
  return tokenizer


def induction(lm: LM, *, length: int = 128, rows: int = 16, seed: int = 0) -> tuple[float, float]:
  """Returns the loss of random tokens in nats per token: the first time that they stand in a row, and the second.

  What a text is like says nothing of them, so that only induction heads know them the second time.

  Args:
    lm: the model.
    length: number of tokens that stand twice.
    rows: number of rows.
    seed: seeds the tokens.
  """
  tokens = np.random.default_rng(seed).integers(lm.config.vocab_size, size=(rows, length))
  logits, _ = lm(np.concatenate([tokens, tokens], axis=1))
  scores = jax.nn.log_softmax(logits[:, :-1])
  losses = -jnp.take_along_axis(scores, np.concatenate([tokens[:, 1:], tokens], axis=1)[..., None], -1)[..., 0]
  return float(losses[:, : length - 1].mean()), float(losses[:, length:].mean())
