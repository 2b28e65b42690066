"""Lines and rows that hold no text: packing stops there, goes on once they are mended, or skips and counts them."""

import os

import pytest

from supra_jax.data import encoding, packing_job
from supra_jax.experiments import tiny
from tests.data.test_packing import OPTIONS, ROOT, contents, prepare, small_pieces, text, write_lines  # noqa: F401
from tests.support import programs

# ruff: noqa: F811


@pytest.mark.parametrize("change", ["mended", "appended", "earlier line", "earlier file", "absent"])
def test_a_bad_line_is_mended(change, tmp_path, text, small_pieces, monkeypatch, capsys):
  """What was packed before it stays, unless that has changed too."""
  file = text.with_name("2.jsonl")
  good = file.read_bytes()
  file.write_bytes(good.replace(b'{"text": "2.90 ', b'{"text"; "2.90 '))
  for _ in range(2):
    with pytest.raises(ValueError, match=r"2\.jsonl, line 91: not JSON"):
      prepare(text, tmp_path / "out", **OPTIONS)
  file.write_bytes(good.replace(b"2.90 ", b"2.9 mended "))
  if change == "appended":
    file.write_bytes(file.read_bytes() + b'{"text": "one more document"}\n' * 3)
  elif change == "earlier line":
    file.write_bytes(file.read_bytes().replace(b"2.3 ", b"2:3 "))
  elif change == "earlier file":
    os.utime(text.with_name("1.jsonl"), ns=(0, 0))
  elif change == "absent":
    file.unlink()
  taken = []
  take = packing_job.Job.take
  monkeypatch.setattr(packing_job.Job, "take", lambda self, *args: taken.append(args) or take(self, *args))
  prepare(text, tmp_path / "out", **OPTIONS)
  pieces = len(taken)
  prepare(text, tmp_path / "whole", **OPTIONS)
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  goes_on = change in ("mended", "appended")
  assert (pieces < 0.8 * (len(taken) - pieces)) == goes_on
  assert ("The input has changed, packing starts over: " in capsys.readouterr().err) != goes_on


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_lines_are_skipped_and_counted(workers, tmp_path, text, small_pieces, monkeypatch):
  write_lines(text.with_name("9.jsonl"), ["of one file more"])
  prepare(text, tmp_path / "good", **OPTIONS)
  kept = {path: path.read_bytes() for path in text.parent.iterdir()}
  for path, lines in kept.items():
    bad = b'{"text": null}\n{"other": "x"}\n{"text": "\\ud800"}\n'
    path.write_bytes(lines[: (at := lines.index(b"\n") + 1)] + bad + lines[at:] + b'{"text": "cut sh')
  with pytest.raises(ValueError, match=r"line 2: no text under 'text'"):
    prepare(text, tmp_path / "out", **OPTIONS)
  made = prepare(text, tmp_path / "out", skip_bad=True, workers=workers, **OPTIONS)
  assert made.bad == 4 * len(kept) and len(made.bad_first) == packing_job.BAD_NAMED
  first = sorted(kept)[0]
  assert made.bad_first[0] == f"{first}, line 2: no text under 'text'."
  assert f"{first}, line 4: no valid Unicode" in made.bad_first[2] and "not JSON" in made.bad_first[3]
  packed_alike = [contents(tmp_path / name / "train") for name in ("out", "good")]
  assert packed_alike[0] == packed_alike[1]
  again = prepare(text, tmp_path / "out", **OPTIONS)
  assert (again.bad, again.bad_first, again.tokens_per_second) == (made.bad, made.bad_first, None)


def test_a_count_of_bad_lines_outlives_a_kill(tmp_path, text, small_pieces, monkeypatch):
  file = text.with_name("0.jsonl")
  file.write_bytes(b"[]\n" * 7 + file.read_bytes())
  saved = packing_job.Job._save

  def save_and_die(self):
    saved(self)
    raise KeyboardInterrupt

  monkeypatch.setattr(packing_job.Job, "_save", save_and_die)
  with pytest.raises(KeyboardInterrupt):
    prepare(text, tmp_path / "out", skip_bad=True, **OPTIONS)
  monkeypatch.setattr(packing_job.Job, "_save", saved)
  assert prepare(text, tmp_path / "out", skip_bad=True, **OPTIONS).bad == 7


def test_the_program(tmp_path, text):
  text.with_name("0.jsonl").write_text("[]\n")
  model = tmp_path / "model"
  model.mkdir()
  (model / "tokenizer.json").write_bytes(tiny.tokenizer_json())
  (model / "config.json").write_text(tiny.tiny_config("supra").to_json())
  flags = [f"--input={text}", f"--tokenizer={model}", f"--output={tmp_path}/out", "--sequence_length=32"]
  ran = programs.run("supra_jax.bin.prepare_data", *flags, "--on_bad_document=skip")
  assert ran.returncode == 0, ran.stderr
  where = text.with_name("0.jsonl")
  assert f"\n1 skipped, which cannot be packed: {where}, line 1: no text under 'text'.\n" in ran.stdout


def test_a_tokenizer_of_another_kind_of_model(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
  (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
  with pytest.raises(
    ValueError, match=r"config\.json is not the config of a supra_jax model\. Convert .*hf_to_orbax --source"
  ):
    encoding.read_tokenizer(tmp_path)
