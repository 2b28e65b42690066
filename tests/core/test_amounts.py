import pytest

from supra_jax.core.amounts import parse_bytes


def test_parse_bytes():
  assert parse_bytes("1.5 GiB") == 3 * 2**29
  assert parse_bytes("24MB") == 24_000_000
  assert parse_bytes("512kB") == 512_000
  assert parse_bytes("5,966,796", plain=True) == parse_bytes("5966796", plain=True) == 5_966_796
  for text in ("24", "MB", "2 KB", "-1MB", "1e3MB"):
    with pytest.raises(ValueError, match=f"'{text}': wanted a number and one of TB, TiB, GB, GiB"):
      parse_bytes(text)
  for text in ("0", "-5", "1,00", "5_000"):
    with pytest.raises(ValueError, match=f"--size={text}: wanted a number and one of .*, as in 6MB"):
      parse_bytes(text, "size", plain=True, example="6MB")
