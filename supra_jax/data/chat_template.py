"""Chat templates: messages are rendered by the checkpoint's own template."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox

from supra_jax.core.plain_json import to_json

Message = Mapping[str, Any]


class ChatTemplate:
  """A chat template in jinja2, rendered as the library transformers renders it, in a sandbox.

  Attributes:
    source: contents of chat_template.jinja.
  """

  def __init__(self, source: str, special: Mapping[str, str]):
    """Takes a template, which is parsed when it is first rendered: a model without chat loads whatever it holds.

    Args:
      source: contents of chat_template.jinja.
      special: {"bos_token": ..., "eos_token": ...}: texts of special tokens that templates may use.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = lambda value, **how: to_json(value, **{"ensure_ascii": False} | how)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    self.source, self._special, self._environment = source, dict(special), environment

  def __reduce__(self) -> tuple[Any, ...]:
    return ChatTemplate, (self.source, self._special)

  @functools.cached_property
  def _template(self) -> jinja2.Template:
    try:
      return self._environment.from_string(self.source)
    except jinja2.TemplateError as error:
      raise ValueError(f"chat_template.jinja cannot be parsed: {error}") from error

  def render(self, messages: Sequence[Message], *, reply: bool = True, **variables: Any) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each {"role": "system" | "user" | "assistant" | ..., "content": text}.
      reply: whether the text ends with what begins an answer.
      **variables: further variables of the template.

    Raises:
      ValueError: there are no messages, one has no role or content, the template cannot be parsed or refuses them.
    """
    messages = list(messages)
    if not messages:
      raise ValueError("messages is empty: wanted [{'role': ..., 'content': ...}, ...].")
    for number, message in enumerate(messages):
      if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"messages[{number}] is {message!r}: wanted {{'role': ..., 'content': ...}}.")
    given, template = self._special | variables, self._template
    try:
      return template.render(messages=messages, add_generation_prompt=reply, **given)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, LookupError) as error:
      raise ValueError(f"chat_template.jinja refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
  """The tag `generation`, which marks what a trainer should learn; it renders what is in it."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: jinja2.parser.Parser) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def template_of(files: Mapping[str, bytes]) -> ChatTemplate | None:
  """Returns the chat template of a model directory; None if it has none.

  Args:
    files: file name -> contents, of chat_template.jinja and tokenizer_config.json.
  """
  if "chat_template.jinja" not in files:
    return None
  settings = json.loads(files.get("tokenizer_config.json", b"{}"))
  special = {}
  for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
      special[name] = token
  return ChatTemplate(files["chat_template.jinja"].decode(), special)
