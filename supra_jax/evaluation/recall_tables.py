"""The tables of a report of `recall.report`, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from supra_jax.evaluation.memory_loss import NATS
from supra_jax.evaluation.readers import TEACHER


def as_markdown(found: Mapping[str, Any]) -> str:
  """Returns a report as Markdown tables."""
  return "\n".join([*_models(found), *_losses(found["loss"]), *_parts(found["parts"]), *_recall(found["recall"])])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
  yield from (f"\n{title}\n", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}")
  yield from (f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None, form: str = ".3f") -> str:
  return "-" if value is None or not np.isfinite(value) else f"{value:{form}}"


def _with_interval(entry: Mapping[str, Any], form: str = ".3f", key: str = "value") -> str:
  low_high = entry["interval"]
  spread = " (any)" if low_high is None else f" ({low_high[0]:{form}} to {low_high[1]:{form}})"
  return _number(entry[key], form) + spread


def _models(found: Mapping[str, Any]) -> Iterator[str]:
  rows = []
  for name, about in found["models"].items():
    held = ", ".join(f"{count} {mixer}" for mixer, count in about["mixers"].items())
    window = " and ".join(map(str, about["windows"])) or "-"
    reach = "any" if about["reach"] is None else f"{about['reach']:,}"
    rows.append([name, f"{about['state_bytes']:,}", about["keys_and_values"], held, window, reach])
  yield from _table("State", ["model", "bytes", "keys and values", "layers", "window", "layers x window"], rows)


def _losses(loss: Mapping[str, Any]) -> Iterator[str]:
  names = list(loss["all"]["loss"])
  lines = [("all", loss["all"])]
  lines += [(f"position {x['from']} to {x['to'] - 1}", x) for x in loss["by_position"]]
  lines += [(f"repeat after {x['from']} to {x['to'] - 1}", x) for x in loss["by_repeat"]]
  for window, against in loss["against"].items():
    lines += [(f"repeat further than the {window}, {against['window']}", against["far_repeats"])]
    lines += [(f"teacher beats the {window} by {NATS:g} nat", against["teacher_gains"])]
  rows = [[what, f"{x['tokens']:,}", *(_number(x["loss"][name]) for name in names)] for what, x in lines]
  title = f"Loss in nats per token, {loss['documents']} documents of {loss['length']} tokens"
  yield from _table(title, ["tokens that", "number", *names], rows)
  rows = [
    [name, window, what.replace("_", " "), _with_interval(against[what]["R"][name], ".2f"), _with_interval(saved)]
    for window, against in loss["against"].items()
    for what in ("far_repeats", "teacher_gains")
    for name, saved in against[what]["saved"].items()
  ]
  title = "R: share of the teacher's advantage over a window that a model has; 95 % intervals over documents"
  yield from _table(title, ["model", "beside the", "tokens", "R", "nats saved"], rows)


def _parts(parts: Mapping[str, Any]) -> Iterator[str]:
  rows = []
  for name, about in parts.items():
    for how in ("nothing", "another"):
      later = ", ".join(f"{x['from']}+ {_number(x['added'])}" for x in about[how]["by_distance"])
      earned = about[how]["added"] / max(about["bytes"] / 2**20, 1e-9)
      replaced = {"nothing": "nothing", "another": "another document's"}[how]
      rows.append(
        [name, f"{about['bytes']:,}", replaced, _with_interval(about[how], key="added"), _number(earned), later]
      )
  head = ["part", "bytes", "replaced by", "loss added", "added per MiB", "by tokens since"]
  yield from _table("Parts of the state", head, rows)


def _recall(recall: Mapping[str, Any]) -> Iterator[str]:
  for kind, distances in recall.items():
    names = list(distances[0]["models"]) if distances else []
    rows = []
    for line in distances:
      notes = ["the teacher fails"] * line["teacher_fails"]
      notes += [f"beyond layers x window: {', '.join(line['beyond_reach'])}"] * bool(line["beyond_reach"])
      shares = [_with_interval(line["models"][name], ".2f", "right") for name in names]
      rows.append([f"{line['distance']:,}", *shares, "; ".join(notes)])
    chance = distances[0]["models"][TEACHER]["chance"] if distances else 0
    yield from _table(
      f"Recall of {kind}: share of right answers; chance is {chance:.2f}", ["distance", *names, ""], rows
    )
