"""Our models in EleutherAI's lm-evaluation-harness (`lm-eval`), as its model `supra_jax`.

`python -m supra_jax.bin.lm_eval --model supra_jax --model_args checkpoint=DIR --tasks ...` imports this module, which
registers the model, and then calls lm_eval's own command line.

Texts are encoded, cut and scored as lm-eval's `hf` model does it with the same tokenizer: encoded with the tokens that
the checkpoint's tokenizer adds, and cut from the left to `max_length` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # registers lm-eval's own models, which are lost where ours are the first
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from supra_jax.evaluation.scoring import Score, Text, Work, scores
from supra_jax.inference.lm import LM, load

TOGETHER = 256  # answers that are generated before they are kept
GENERATED = 256  # most tokens of an answer, unless a task says otherwise
# Sampling settings of lm-eval that `LM.complete` takes by the same name.
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}


@register_model("supra_jax")
class HarnessLM(TemplateLM):
  """A model directory of this project, as lm-eval's `LM`.

  Attributes:
    lm: the model.
    max_length: texts are cut from the left to so many tokens; None: they are not cut.
    work: tokens of all texts that were scored, and tokens that were read for them.
  """

  def __init__(
    self,
    checkpoint: str | None = None,
    *,
    lm: LM | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
    quantize: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
    batch_size: Any = None,
    max_batch_size: Any = None,
    device: Any = None,
  ):
    """Loads a model.

    Args:
      checkpoint: model directory.
      lm: a model that is loaded already, in place of `checkpoint`.
      dtype: see `load`.
      mesh: see `load`; in lm_eval's command line axes are separated by `+`, "fsdp:4+tensor:2".
      quantize: see `load`.
      max_length: most tokens of a text; None: the positions that the model was trained with, as lm-eval's `hf`; 0: any.
      batch_tokens: see `scoring.scores`.
      progress: whether to show progress on stderr.
      batch_size: not used; `batch_tokens` takes its place.
      max_batch_size: not used.
      device: not used; jax chooses.

    Raises:
      FileNotFoundError: as `load`.
      ValueError: as `load`; or the model has no tokenizer.
    """
    super().__init__()
    del batch_size, max_batch_size, device
    if lm is None:
      if checkpoint is None:
        raise ValueError("No model: wanted checkpoint=DIR.")
      lm = load(checkpoint, dtype, mesh=mesh and mesh.replace("+", ","), quantize=quantize)
    if lm.tokenizer is None:
      raise ValueError("This checkpoint has no tokenizer: lm-eval's tasks are texts.")
    self.lm, self.work, self._progress, self._batch_tokens = lm, Work(), progress, batch_tokens
    self.max_length = lm.config.max_positions if max_length is None else max_length or None
    self._checkpoint = checkpoint

  @property
  def eot_token_id(self) -> int:
    return (*self.lm.config.eos_token_ids, *self._begin)[0]

  @property
  def prefix_token_id(self) -> int:
    return (*self._begin, *self.lm.config.eos_token_ids)[0]

  @property
  def _begin(self) -> tuple[int, ...]:
    token = self.lm.config.bos_token_id
    return () if token is None else (token,)

  @property
  def tokenizer_name(self) -> str:
    return (self._checkpoint or "supra_jax").replace("/", "__")

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    del kwargs
    begins = self._begin and string.startswith(self._text([self.prefix_token_id]))
    bos = False if add_special_tokens is None and begins else add_special_tokens
    return self._tokenizer.encode(string, bos=bos)

  @property
  def _tokenizer(self) -> Any:
    return self.lm.tokenizer

  def _text(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids, keep_special=True)

  def chat_template(self, chat_template: bool | str = False) -> str:
    return "" if self.lm.template is None or not chat_template else self.lm.template.source

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    template = self.lm.template
    if template is None:
      raise ValueError("This checkpoint has no chat template: do not ask for it.")
    try:
      text = template.render(chat_history, reply=add_generation_prompt)
    except ValueError:
      without = [message for message in chat_history if message["role"] != "system"]
      if len(without) == len(chat_history):
        raise
      text = template.render(without, reply=add_generation_prompt)  # as lm-eval does: some templates know no system
    if add_generation_prompt:
      return text
    last = chat_history[-1]["content"].strip()  # the model goes on from it: what ends a turn is left out
    return text[: text.rindex(last) + len(last)]

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[Score]:
    del kwargs

    def keep(i: int, score: Score) -> None:
      if (pair := requests[i][0]) is not None:
        self.cache_hook.add_partial("loglikelihood", pair, score)

    texts = [self._cut(context, continuation) for _, context, continuation in requests]
    return self._scores(texts, progress=not disable_tqdm, each=keep)

  def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Text:
    """Returns a text of at most `max_length` inputs, those at the end."""
    tokens = (*context, *continuation)
    tokens = tokens if self.max_length is None else tokens[-(self.max_length + 1) :]
    return Text(tokens, max(len(tokens) - len(continuation), 1))

  def _scores(self, texts: Sequence[Text], *, progress: bool, each: Any = None) -> list[Score]:
    shown = self._progress and progress
    found, work = scores(self.lm, texts, batch_tokens=self._batch_tokens, progress=shown, each=each)
    self.work += work
    return found

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    texts, owners = [], []
    for i, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])
      length = self.max_length or max(len(ids), 1)
      for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, length, context_len=1):
        texts.append(self._cut(*utils.make_disjoint_window(window)))
        owners.append(i)
    found = self._scores(texts, progress=not disable_tqdm)
    sums = np.zeros(len(requests))
    np.add.at(sums, owners, [score for score, _ in found])
    for request, total in zip(requests, sums.tolist(), strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return sums.tolist()

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    found: list[str] = []
    for start in range(0, len(requests), TOGETHER):
      part = requests[start : start + TOGETHER]
      asked = [_settings(request.args[1]) for request in part]
      prompts = [self._prompt(request.args[0], how["max_new_tokens"]) for request, how in zip(part, asked, strict=True)]
      together: dict[str, Any] = {
        name: [how.get(name) for how in asked] for name in sorted({name for how in asked for name in how})
      }
      shown = self._progress and not disable_tqdm
      texts = [done.text for done in self.lm.complete(prompts, progress=shown, **together)]
      for request, text in zip(part, texts, strict=True):
        self.cache_hook.add_partial("generate_until", request.args, text)
      found += texts
    return found

  def _prompt(self, text: str, new: int) -> list[int]:
    ids = self.tok_encode(text)
    if self.max_length is None:
      return ids
    if new >= self.max_length:
      raise ValueError(
        f"{new} tokens are to be generated, and max_length={self.max_length} leaves none for the prompt."
      )
    return ids[-(self.max_length - new) :]

  def get_model_info(self) -> dict[str, Any]:
    """Returns facts about the model for lm-eval's results."""
    config = self.lm.config
    about = {"checkpoint": self._checkpoint, "fingerprint": self.lm.checkpoint}
    return about | {
      "mixers": sorted(set(config.mixers)),
      "dtype": str(self.lm.model.dtype),
      "max_length": self.max_length,
    }


def _settings(how: Mapping[str, Any]) -> dict[str, Any]:
  """Returns arguments of `LM.complete` for lm-eval's settings of a request; without do_sample an answer is greedy.

  Raises:
    ValueError: a setting is not known.
  """
  how = dict(how)
  until = how.pop("until", None) or []
  new = how.pop("max_gen_toks", how.pop("max_new_tokens", how.pop("max_tokens", GENERATED)))
  sampled = how.pop("do_sample", bool(how.get("temperature")))
  if unknown := set(how) - _SAMPLING:
    raise ValueError(f"generation_kwargs has {', '.join(sorted(unknown))}: known are {', '.join(sorted(_SAMPLING))}.")
  if not sampled:
    how["temperature"] = 0.0
  stop = [until] if isinstance(until, str) else list(until)
  return how | {"max_new_tokens": int(new), "stop": [text for text in stop if text]}
