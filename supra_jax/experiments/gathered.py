"""Results of many models in one JSON file: one that fails does not stop the others, and none is asked twice.

A call with further models adds them to the file. The file is written after each model. It has no paths of the machine
but those that the user gave.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supra_jax.core.plain_json import to_json, write_json
from supra_jax.core.run_record import run_record
from supra_jax.storage.model_directory import CONFIG_FILE, fingerprint

STRETCHED = r"yarn:(\d+(?:\.\d+)?):"  # before a model directory whose rotary embedding YaRN stretches


def named(models: Sequence[str]) -> dict[str, str]:
  """Returns {name: SPEC} of models that are given as NAME=SPEC, or as SPEC, which then is the name too.

  Raises:
    ValueError: there is no model, a name or SPEC is empty, two models have one name, or a name has the sign that
      parts the cells of a table.
  """
  found: dict[str, str] = {}
  for model in models:
    before, equals, after = model.partition("=")
    is_pair = equals and not Path(os.path.expanduser(model)).is_dir()
    name, spec = (before.strip(), after.strip()) if is_pair else (model.strip(), model.strip())
    if not name or not spec or "|" in name:
      raise ValueError(f"models has {model!r}: wanted NAME=SPEC or SPEC, a model directory or hf:NAME, without a |.")
    if name in found:
      raise ValueError(f"models has two of the name {name!r}: give each its own, as in NAME=SPEC.")
    found[name] = spec
  if not found:
    raise ValueError("models is empty: wanted model directories, or hf:NAME for models of transformers.")
  return found


def gather(
  models: Mapping[str, str],
  output: Path,
  about: Mapping[str, Any],
  ask: Callable[[str, str], Any],
  *,
  check: Callable[[], Any] = lambda: None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Asks the models whose results `output` does not have yet, and writes it after each of them.

  A model is known by its SPEC and, if that is a model directory, by the directory's fingerprint; one whose directory is
  no longer there, by its SPEC alone. One that changed and then fails keeps its results of before.

  Args:
    models: name -> SPEC.
    output: the JSON file.
    about: what the models are asked, as values of JSON, paths and numbers. It has to be that of earlier calls.
    ask: (name, SPEC) -> results, as values of JSON.
    check: called once after a model failed; raises an error that is not the model's fault.
    say: called with a line for each model.

  Returns:
    What the file holds: {"about", "models": {name: {"spec", "fingerprint", "made_by", "results"}}, "not_run": {name:
    {"spec", "error"}}}, with the models of earlier calls first.

  Raises:
    ValueError: the file holds results of something else.
    Exception: `check` raised it.
  """
  about = json.loads(to_json(about, default=os.fspath))
  kept = earlier(output, about, {"models": {}, "not_run": {}})
  checked = False
  for name, spec in models.items():
    known, mark = kept["models"].get(name), _mark(spec)
    if known is not None and known["spec"] == spec and mark in (None, known["fingerprint"]):
      say(f"{name}: known already.")
      continue
    kept["not_run"].pop(name, None)
    try:
      results = ask(name, spec)
      kept["models"][name] = {"spec": spec, "fingerprint": mark, "made_by": run_record(), "results": results}
      say(f"{name}: done.")
    except Exception as error:  # libraries raise many types, and one model's must not lose the others
      if not checked:
        check()
        checked = True
      kept["not_run"][name] = {"spec": spec, "error": first_line(error)}
      say(f"{name}: not run: {first_line(error)}")
    write_json(output, kept)
  return kept


def earlier(
  output: Path | None, about: Mapping[str, Any], begins: Mapping[str, Any], *, flag: str = "--output"
) -> dict[str, Any]:
  """Returns {"about": about} and what the file of earlier calls holds; where there is none, how that begins.

  Args:
    output: the JSON file, if any.
    about: what was asked, as values of JSON.
    begins: name -> value, a list or dict, before the first call.
    flag: what the error tells the user to choose anew.

  Raises:
    ValueError: the file holds results of something else.
  """
  if output is None or not output.exists():
    return {"about": about, **begins}
  try:
    kept = json.loads(output.read_text())
    theirs, found = dict(kept["about"]), {name: type(empty)(kept[name]) for name, empty in begins.items()}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{output} is there and holds something else: take another {flag}.") from error
  for field in sorted(theirs.keys() | about.keys()):
    if theirs.get(field) != about.get(field):
      raise ValueError(
        f"{output} holds results for {field}={theirs.get(field)!r}, not {about.get(field)!r}: take another {flag}."
      )
  return {"about": about, **found}


def _mark(spec: str) -> str | None:
  """Returns the fingerprint of the model directory that a SPEC names; None if it names none that is here."""
  directory = os.path.expanduser(re.sub(STRETCHED, "", spec))
  return fingerprint(directory) if (Path(directory) / CONFIG_FILE).is_file() else None


def first_line(error: BaseException) -> str:
  """Returns the first line of an error that says something, its type if none does, without paths of this machine."""
  text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
  for path, short in ((Path.cwd(), "."), (Path.home(), "~")):
    text = re.sub(rf"{re.escape(str(path))}(?=/|\b)", short, text) if len(path.parts) > 1 else text
  return text


def parts(output: Path) -> Path:
  """Returns the directory beside `output` for what is known of models that are not done."""
  return output.with_name(f"{output.stem}_parts")


def slug(name: str) -> str:
  """Returns a name in letters that any file system has; two names never have the same."""
  plain = re.sub("[^0-9A-Za-z.+]+", "-", name).strip("-.")
  return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")


def not_run_rows(kept: Mapping[str, Any], cells: int) -> list[str]:
  """Returns a row of a table in Markdown, of so many cells, for each model that was not run: its name and why."""
  rows = []
  for name, why in kept["not_run"].items():
    said = why["error"].replace("|", "/")
    rows.append(f"| **{name}** | not run: {said} |{' |' * (cells - 2)}")
  return rows
