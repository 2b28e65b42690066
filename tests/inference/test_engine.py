"""Many texts at a time: each is what it is alone, however the rows are shared."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.experiments import tiny
from supra_jax.inference import decode
from supra_jax.inference import lm as lm_module
from supra_jax.inference.engine import Engine, Request
from supra_jax.inference.lm import LM
from supra_jax.inference.sampling import Sampling
from supra_jax.model.finite import NotFiniteError
from supra_jax.model.registry import layers

pytestmark = pytest.mark.usefixtures("quick_compilation")
MIXERS = {
  "supra": layers(("supra",) * 2),
  "hybrid": layers(("softmax", "supra_window"), window=5, sinks=2),
}
PROMPTS = ["The name", "A", "Once upon a time there was", "x" * 40, "In the beginning", "1 2 3 4 5 6 7 8 9"]


@pytest.fixture(scope="module", params=MIXERS)
def lm(request, random_params, tmp_path_factory):
  directory = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", "supra", layers=MIXERS[request.param])
  from supra_jax.storage.model_directory import load_model

  stored = load_model(directory)
  from supra_jax.data.tokenizer import Tokenizer

  return LM(stored.config, random_params(stored.config), Tokenizer.from_files(stored.tokenizer_files, stored.config))


def test_a_list_is_its_texts_alone(lm):
  alone = [lm.generate(prompt, max_new_tokens=20) for prompt in PROMPTS]
  assert lm.generate(PROMPTS, max_new_tokens=20, rows=4) == alone
  assert lm.generate(PROMPTS, max_new_tokens=20, rows=16) == alone
  assert ["".join(lm.stream(prompt, max_new_tokens=20)) for prompt in PROMPTS] == alone
  assert lm.generate([], max_new_tokens=3) == [] and lm.generate([PROMPTS[0]], max_new_tokens=0) == [""]


def test_a_list_differs_from_its_texts_alone_only_at_near_ties(lm):
  """Programs of other widths round in other ways: where a token differs, the two likeliest are as good as equal."""
  prompts = [f"{PROMPTS[i % 6]} {i}" for i in range(24)]
  together = lm.complete(prompts, max_new_tokens=24, rows=7)
  ties = 0
  for prompt, completion in zip(prompts, together, strict=True):
    alone = lm.complete([prompt], max_new_tokens=24)[0].tokens
    same = next((i for i, (a, b) in enumerate(zip(alone, completion.tokens, strict=True)) if a != b), None)
    if same is None:
      continue
    ties += 1  # what follows another token is another text
    logits, _ = lm([[*lm.tokenizer.encode(prompt), *alone[:same]]])
    second, first = np.sort(np.asarray(logits)[0, -1])[-2:]
    assert first - second < 1e-4, prompt
  assert ties <= 2, f"{ties} of {len(prompts)} texts meet a near tie"


def test_rows_of_one_program_do_not_change_each_other(lm):
  """To the bit: log-probabilities of a text among others, in another order, beside texts that draw in other ways."""
  how = {"rows": 3, "max_new_tokens": [15, 4, 9, 30, 2, 21], "seed": list(range(6))}
  temperatures, top_ks, penalties = [1.0, 0.0, 0.7, 1.3, 0.0, 1.0], [0, 0, 5, 600, 3, 0], [1.0, 1.2, 1.0, 1.0, 1.5, 1.0]
  ways = {"temperature": temperatures, "top_k": top_ks, "repetition_penalty": penalties}
  together = lm.complete(PROMPTS, **how, **ways)
  order = [4, 2, 0, 5, 3, 1]
  turned = {name: [value[i] for i in order] for name, value in (ways | how).items() if name != "rows"}
  again = lm.complete([PROMPTS[i] for i in order], rows=3, **turned)
  for i, completion in zip(order, again, strict=True):
    assert completion == together[i]
  assert [len(x.tokens) for x in together] == how["max_new_tokens"]


def test_arguments_in_any_form(lm):
  """Arrays, generators and tuples are lists; stop strings and ids are for all texts or for each."""
  prompts, free = PROMPTS[:3], lm.complete(PROMPTS[:3], max_new_tokens=20)
  want = [
    lm.complete([p], max_new_tokens=n, seed=s, temperature=1.0)[0]
    for p, n, s in zip(prompts, (3, 9, 5), (7, 8, 9), strict=True)
  ]
  how = {"max_new_tokens": np.array([3, 9, 5]), "seed": (s for s in (7, 8, 9)), "temperature": jnp.ones(3)}
  assert [x.tokens for x in lm.complete((p for p in prompts), **how)] == [x.tokens for x in want]
  assert lm.generate([lm.tokenizer.encode(prompts[0])], max_new_tokens=20) == [free[0].text]
  ends = [[], [free[1].tokens[4]], [free[2].tokens[2], free[2].tokens[7]]]
  stopped = lm.complete(prompts, max_new_tokens=20, stop_ids=ends)
  assert [len(x.tokens) for x in stopped] == [
    20,
    free[1].tokens.index(ends[1][0]) + 1,
    min(map(free[2].tokens.index, ends[2])) + 1,
  ]
  assert lm.complete(prompts[1:2], max_new_tokens=20, stop_ids=ends[1])[0].tokens == stopped[1].tokens
  strings = [(), (free[1].text[3:5],), (s for s in [free[2].text[2:4]])]
  texts = lm.generate(prompts, max_new_tokens=20, stop=strings)
  assert texts[0] == free[0].text and texts[1] == free[1].text[: free[1].text.index(free[1].text[3:5])]
  assert texts[2] == free[2].text[: free[2].text.index(free[2].text[2:4])]
  assert lm.generate(prompts[1:2], max_new_tokens=20, stop=free[1].text[3:5]) == [texts[1]]


def test_nothing_compiles_anew(lm):
  def run(**ways):
    lm.complete(["The name", "A"], max_new_tokens=9, rows=2, **ways)

  run(seed=1, temperature=0.5)  # one program serves all that is not greedy, another what is
  run()
  before = decode.decode_steps._cache_size(), decode.first_token._cache_size(), decode.put_rows._cache_size()
  run(temperature=[1.0, 0.3], top_k=7, top_p=0.5, min_p=0.1, seed=4)
  run(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, logit_bias={5: 2.0}, stop=["x"], logprobs=3)
  assert (decode.decode_steps._cache_size(), decode.first_token._cache_size(), decode.put_rows._cache_size()) == before


def test_draws_depend_on_the_seed_and_the_number_alone(lm):
  same = lm.complete(["A"] * 3, max_new_tokens=12, temperature=1.0, seed=[5, 5, 6])
  assert same[0] == same[1] != same[2]
  # One seed for all: those that follow have the next numbers.
  for i, completion in enumerate(lm.complete(["A"] * 3, max_new_tokens=12, temperature=1.0, seed=4)):
    assert completion.tokens == lm.complete(["A"], max_new_tokens=12, temperature=1.0, seed=4 + i)[0].tokens


def test_log_probabilities_are_the_models(lm):
  (made,) = lm.complete(["The name"], max_new_tokens=9, temperature=1.0, seed=3, logprobs=4)
  prompt = lm.tokenizer.encode("The name")
  logits, _ = lm(np.asarray([[*prompt, *made.tokens]]))
  wanted = np.asarray(jax.nn.log_softmax(logits))[0, len(prompt) - 1 : -1]
  np.testing.assert_allclose(made.logprobs, wanted[np.arange(9), list(made.tokens)], atol=1e-3)
  for top, row in zip(made.top_logprobs, wanted, strict=True):
    assert list(top) == np.argsort(-row)[:4].tolist()
    np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:4], atol=1e-3)


def test_stop_strings_end_a_text_wherever_they_lie(lm):
  whole = lm.generate("The name", max_new_tokens=40)
  for start, end in ((3, 5), (6, 11), (1, 2), (len(whole) - 2, len(whole))):
    stop = whole[start:end]
    (made,) = lm.complete(["The name"], max_new_tokens=40, stop=["never in it", stop])
    assert (made.text, made.finish) == (whole[: whole.index(stop)], "stop")
    pieces = list(lm.stream("The name", max_new_tokens=40, stop=stop))
    assert "".join(pieces) == made.text and len(pieces) > (start > 5)
  (made,) = lm.complete(["The name"], max_new_tokens=40, stop=["never in it"])
  assert (made.text, made.finish, len(made.tokens)) == (whole, "length", 40)
  with pytest.raises(ValueError, match="an empty string is everywhere"):
    lm.generate("The name", stop=["a", ""])


def test_a_stream_is_asynchronous_too(lm):
  async def both():
    found = [[], []]

    async def follow(i):
      async for piece in lm.astream(PROMPTS[i], max_new_tokens=20):
        found[i].append(piece)

    await asyncio.gather(follow(0), follow(1))
    return ["".join(pieces) for pieces in found]

  assert asyncio.run(both()) == [lm.generate(prompt, max_new_tokens=20) for prompt in PROMPTS[:2]]


def test_a_long_prompt_does_not_hold_up_the_others(lm, monkeypatch):
  monkeypatch.setattr(decode, "PREFILL_TOKENS", 32)
  engine = Engine(lm.model, lm.params, rows=2, capacity=400)
  short, long = Request([5, 6], max_new_tokens=40), Request(np.arange(300) % 90 + 1, max_new_tokens=3)
  engine.submit(short)
  engine.step()
  engine.submit(long)
  order = [request for _ in range(20) for request, _ in engine.step()]
  assert order.count(short) >= 39 and order.count(long) == 3
  assert order.index(long) > 30 and not engine.is_busy
  # The rows are free again.
  engine.submit(Request([7], max_new_tokens=5))
  assert sum(len(engine.step()) for _ in range(5)) == 5


def test_a_long_text_takes_no_memory_beside_short_ones(lm, monkeypatch):
  """Caches have one length in an engine, so that a long text among short ones has an engine of its own."""
  made = []

  class Watched(Engine):
    def __init__(self, *args, **how):
      made.append((how["rows"], how["capacity"]))
      super().__init__(*args, **how)

  prompts = [[7] * length for length in (9, 3, 300, 5, 40)]
  alone = [lm.complete([prompt], max_new_tokens=6)[0].tokens for prompt in prompts]
  monkeypatch.setattr(lm_module, "Engine", Watched)
  monkeypatch.setattr(lm_module, "CACHE", 64)
  assert [done.tokens for done in lm.complete(prompts, max_new_tokens=6)] == alone
  assert made == ([(4, 46), (1, 306)] if "softmax" in lm.config.mixers else [(5, 306)])


def test_a_state_that_is_not_finite_is_named(lm):
  state = lm.read("The name")
  broken = dataclasses.replace(state, hidden=jnp.full_like(state.hidden, np.nan))
  with pytest.raises(NotFiniteError, match="The state that the text goes on from is not finite"):
    lm.generate("", state=broken)


def test_what_is_finished_early_leaves_its_row(lm):
  engine = Engine(lm.model, lm.params, rows=1, capacity=100)
  first, second = Request([5], max_new_tokens=60), Request([6], max_new_tokens=4)
  engine.submit(first)
  engine.submit(second)
  tokens = [token for _ in range(2) for _, token in engine.step()]
  assert [token.number for token in tokens] == list(range(len(tokens)))
  engine.finish(first)
  rest = [request for _ in range(6) for request, _ in engine.step()]
  assert rest == [second] * 4 and not engine.is_busy
  engine.finish(first)  # once more changes nothing


@pytest.mark.parametrize(
  ("how", "said"),
  [
    ({"prompts": "The name"}, "prompts is a text: wanted a list"),
    ({"logprobs": 99}, "logprobs=99, rows=32: wanted 0 to 20"),
    ({"rows": 0}, "rows=0"),
    ({"temperature": [1.0]}, "temperature has 1 values for 2 prompts"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1: wanted a whole number"),
    ({"max_new_tokens": [1, 2, 3]}, "max_new_tokens has 3 values for 2 prompts"),
    ({"max_new_tokens": "5"}, "max_new_tokens='5': wanted a whole number"),
    ({"logprobs": 2.5}, "logprobs=2.5"),
    ({"seed": "x"}, "seed='x': wanted a whole number"),
    ({"top_k": 2**31}, "top_k=2147483648: wanted"),
    ({"stop": [1]}, "stop"),
    ({"stop": [["a"], ["b"], ["c"]]}, "stop has 3 values for 2 prompts"),
    ({"stop_ids": ["a"]}, "stop_ids"),
    ({"prompts": [b"a", "b"]}, "wanted a text, or token ids"),
    ({"prompts": [[1.5], [2]]}, "wanted a text, or token ids"),
    ({"logit_bias": {5: 1e39}}, "logit_bias has 5"),
    ({"top_p": 2.0}, "top_p=2.0: wanted"),
    ({"prompts": [1, 2, 3]}, "prompts holds a number: wanted a list of prompts"),
    ({"prompts": None}, "wanted a text, or token ids"),
    ({"stop": 5}, "stop=5: wanted texts"),
    ({"seed": -1}, "seed=-1: wanted"),
    ({"seed": 2**40}, "seed=1099511627776: wanted"),
    ({"prompts": [[1], [10_000]]}, "Token 10000 is not in the vocabulary"),
    ({"logit_bias": {10_000: 1.0}}, "logit_bias has the token 10000"),
  ],
)
def test_what_cannot_be_is_named(lm, how, said):
  with pytest.raises(ValueError, match=said):
    lm.complete(**{"prompts": ["The name", "A"], "max_new_tokens": 2} | how)


def test_arrays_of_jax_are_values_too(lm):
  want = lm.complete([[5, 6], [7]], max_new_tokens=3, temperature=0.5, stop_ids=[9])
  arrays = {"max_new_tokens": jnp.int32(3), "temperature": jnp.float32(0.5), "stop_ids": jnp.array([9])}
  assert lm.complete([jnp.array([5, 6]), np.array([7])], **arrays) == want


def test_odd_arguments_are_type_errors(lm):
  with pytest.raises(TypeError, match="Unknown arguments: temprature"):
    lm.generate("The name", temprature=1.0)


def test_what_does_not_fit_is_refused(lm):
  engine = Engine(lm.model, lm.params, rows=1, capacity=20)
  with pytest.raises(ValueError, match="max_new_tokens=0: wanted at least 1"):
    engine.submit(Request([5], max_new_tokens=0))
  with pytest.raises(ValueError, match="The prompt is empty"):
    engine.submit(Request([]))
  if "softmax" in lm.config.mixers:
    with pytest.raises(
      ValueError, match="A text of 21 tokens, prompt and answer, is longer than the 20 of this engine"
    ):
      engine.submit(Request([5], Sampling(), 20))
  else:
    engine.submit(Request([5], Sampling(), 20))
