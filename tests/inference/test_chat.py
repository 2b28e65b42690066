"""Conversations: rendered as transformers renders them, and read no more than once."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys

import pytest

import supra_jax
from benchmarks import runs
from supra_jax.data.chat_template import ChatTemplate
from supra_jax.experiments import tiny
from supra_jax.storage.model_directory import load_model, save_model
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIMPLE = (
  "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {
  "simple": SIMPLE,
  "marked": SIMPLE.replace("{{ m", "{% generation %}{{ m").replace("}}{% endfor", "}}{% endgeneration %}{% endfor"),
  "blocks": """{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content %}
  {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role not in ['user', 'assistant'] %}
    {{- raise_exception('roles are user and assistant') }}
  {%- endif %}
  {%- if loop.index > 20 %}{% break %}{% endif %}
  {{- '[' + message.role + '] ' + message.content | trim + eos_token }}
  {% if message.facts is defined %}{{ message.facts | tojson }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}""",
}
TALK = [
  {"role": "user", "content": " What is in a name? "},
  {"role": "assistant", "content": "A rose", "facts": {"ü": [1, 2.5, None]}},
  {"role": "user", "content": "Ünï <b>code</b>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("reply", [True, False])
def test_it_renders_as_transformers_does(kind, reply):
  chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
  (wanted,), _ = chat_template_utils.render_jinja_template(
    [TALK], chat_template=TEMPLATES[kind], add_generation_prompt=reply, **SPECIAL
  )
  assert ChatTemplate(TEMPLATES[kind], SPECIAL).render(TALK, reply=reply) == wanted


@pytest.mark.parametrize(
  ("template", "messages", "said"),
  [
    ("{% for %}", TALK, "chat_template.jinja cannot be parsed"),
    (TEMPLATES["blocks"], [{"role": "tool", "content": "x"}], "refuses these messages: roles are user and assistant"),
    ("{{ messages[0].missing.deeper }}", TALK, "refuses these messages: "),
    ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", TALK, "refuses these messages: "),
    (SIMPLE, [{"content": "x"}], r"messages\[0\] is \{'content': 'x'\}: wanted"),
    (SIMPLE, [], "messages is empty"),
    ("{{ 1 / 0 }}", TALK, "refuses these messages: "),
    (SIMPLE, ["x"], r"messages\[0\] is 'x': wanted"),
  ],
)
def test_what_cannot_be_rendered_is_named(template, messages, said):
  with pytest.raises(ValueError, match=said):
    ChatTemplate(template, SPECIAL).render(messages)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  parent = tmp_path_factory.mktemp("models")
  model = load_model(tiny.write_checkpoint(parent / "plain", "supra"))
  files = {**model.tokenizer_files, "chat_template.jinja": SIMPLE.encode()}
  save_model(parent / "chat", config=model.config, params=model.params, tokenizer_files=files, source={})
  return parent / "chat"


@pytest.fixture
def lm(directory):
  return supra_jax.load(directory)


def test_a_conversation_goes_on_from_its_state(lm, monkeypatch, recwarn):
  # Replies whose text has the tokens that were drawn, as a trained model's have.
  (the,) = lm.tokenizer.encode(" the")
  assert lm.tokenizer.encode("assistant:" + " the" * 7)[-7:] == [the] * 7
  how = {"max_new_tokens": 7, "logit_bias": {the: 100.0}}
  talk, read = [{"role": "user", "content": "What is in a name?"}], []
  reading = lm.read
  monkeypatch.setattr(lm, "read", lambda ids, state=None: (read.append(len(ids)), reading(ids, state))[1])
  for question in ("Why?", "And then?"):
    text = lm.template.render(talk)
    reply = lm.chat(talk, **how)
    assert reply == lm.generate(text, **how) == " the" * 7
    talk += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
  assert not recwarn.list
  # All is read once: the first message, its reply, what is new in the second turn, its reply.
  total = len(lm.tokenizer.encode(lm.template.render(talk[:3])))
  assert read[1] == read[3] == 7 and read[0] + read[1] + read[2] == total
  # Other messages: read from the start, which is said.
  other = [{"role": "user", "content": "Other"}]
  with pytest.warns(UserWarning, match="These messages do not go on from the last reply"):
    assert lm.chat(other, max_new_tokens=5) == lm.generate(lm.template.render(other), max_new_tokens=5)
  # The same question again goes on from the state before its reply.
  del read[:]
  recwarn.clear()
  lm.chat(other, max_new_tokens=5)
  assert read[0] == 0 and not recwarn.list
  assert lm.chat(other, max_new_tokens=5, stop=(s for s in [lm.chat(other, max_new_tokens=5)[0]])) == ""
  # A reply that is broken off: its question is not read again.
  del read[:]
  next(lm.stream_chat(talk, max_new_tokens=5))
  lm.chat(talk, max_new_tokens=5)
  assert read[1] == 0


def test_without_a_template(tmp_path):
  plain = supra_jax.load(tiny.write_checkpoint(tmp_path / "model", "supra"))
  with pytest.raises(ValueError, match="This checkpoint has no chat template: use `generate`"):
    plain.chat(TALK)
  bare = dataclasses.replace(load_model(tmp_path / "model"), tokenizer_files={})
  with pytest.raises(ValueError, match="no chat template"):
    supra_jax.LM(bare.config, bare.params).chat(TALK)


def test_from_the_command_line(lm, directory, monkeypatch):
  command = ["supra_jax.bin.generate", f"--checkpoint={directory}", "--max_new_tokens=6"]
  asked = [{"role": "user", "content": "Why?"}]
  first = lm.chat(asked, max_new_tokens=6)
  assert programs.run(*command, "--prompt=Why?", "--chat").stdout == f"{first}\n"
  monkeypatch.setattr(sys, "stdin", io.StringIO("And then?\n"))
  talk = [*asked, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
  second = lm.chat(talk, max_new_tokens=6)
  assert programs.run(*command, "--prompt=Why?", "--interactive").stdout == f"{first}\n{second}\n"
  monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n"))
  assert programs.run(*command, "--interactive").stdout == f"{first}\n"
  environment = os.environ | runs.importable()
  with subprocess.Popen(
    [sys.executable, "-m", *command, "--interactive"],
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    for _ in range(2):  # each line is answered when it comes
      print("\nWhy?", file=process.stdin, flush=True)
      answered = process.stdout.readline()
      assert answered
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    # 130 where Ctrl-C comes between two replies.
    assert process.wait(60) in (0, 130) and "Traceback" not in process.stderr.read()
  ran = programs.run(*command)
  assert ran.returncode == 1 and "--prompt is not given: wanted a text to continue, or --interactive" in ran.stderr
