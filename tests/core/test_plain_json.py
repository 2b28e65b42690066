"""Standard JSON, and where it can be written."""

import pytest

from supra_jax.core.plain_json import check_output, write_json


def test_an_output_is_checked_before_long_work(tmp_path):
  """What could not be written at the end is said at the beginning; the folders are made."""
  check_output(None)
  check_output(tmp_path / "new/folder/found.json", (".png",))
  assert (tmp_path / "new/folder").is_dir()
  (tmp_path / "file").write_text("")
  for path, said in (
    (tmp_path, "not a directory"),
    (tmp_path / "found.png", r"\.png is written beside it"),
    (tmp_path / "file/found.json", "file cannot be made: "),
    ("gs://bucket/found.json", "only a local path"),
  ):
    with pytest.raises(ValueError, match=said):
      check_output(path, (".png",))


def test_a_file_is_whole_or_as_before(tmp_path):
  write_json(tmp_path / "a.json", {"x": float("nan")})
  with pytest.raises(TypeError):
    write_json(tmp_path / "a.json", {"x": object()})
  assert (tmp_path / "a.json").read_text() == '{\n  "x": null\n}\n'
