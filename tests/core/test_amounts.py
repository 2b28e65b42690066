import pytest

from supra_jax.core.amounts import parse_bytes


def test_parse_bytes():
  assert parse_bytes("1.5 GiB") == 3 * 2**29
  assert parse_bytes("24MB") == 24_000_000
  assert parse_bytes("512kB") == 512_000
  for text in ("24", "MB", "2 KB", "-1MB", "1e3MB"):
    with pytest.raises(ValueError, match="wanted a number and one of GB, GiB"):
      parse_bytes(text)
