"""Holds the code to its house: who may import whom, and how long a file may grow.

A module may import those listed before it, never those after. A new module is listed here, on the lowest floor that
has all it needs.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels_pallas", "supra_jax", "convert_weights")

# supra_jax, from the ground up. `__init__` is the front door; `bin.*` are the programs, `bin.entry` what they share.
FLOORS = {
  "F1": ("plain_json", "progress", "config", "sharding", "bucket", "files"),
  "F2": ("layers", "feature_maps", "softmax", "attention", "transformer", "finite", "adapters", "layer_losses"),
  "F3": (
    "params_io",
    "checkpoint",
    "parameter_reader",
    "tokenizer_backends",
    "tokenizer",
    "text",
    "packed",
    "encoding",
    "packing",
    "data",
    "losses",
    "optimizer",
    "metrics",
    "picture",
    "flops",
    "run_record",
    "compiled",
    "calibrate",
    "hybrid",
    "linearize",
  ),
  "F4": ("generate", "lm", "evaluate", "train_config", "train_step", "train_setup", "plan", "reporter", "train"),
  "F5": ("__init__", "demo", "bin.options", "bin.entry", "bin.*"),
}
ORDER = [f"supra_jax.{name}" for floor in FLOORS.values() for name in floor]

# Modules of supra_jax that convert_weights may use, and those of supra_jax that may use convert_weights.
OPEN_TO_CONVERTERS = {
  f"supra_jax.{name}"
  for name in (
    "bin.entry",
    "config",
    "checkpoint",
    "files",
    "finite",
    "layers",
    "lm",
    "parameter_reader",
    "params_io",
    "plain_json",
    "progress",
    "tokenizer",
    "tokenizer_backends",
  )
}
USES_CONVERTERS = {"supra_jax.demo", "supra_jax.bin.demo"}

# Packages that only some modules may import.
RESERVED = {
  "orbax": r"supra_jax\.(checkpoint|params_io|parameter_reader)",
  "etils": r"supra_jax\.(bucket|files)",
  "fsspec": r"supra_jax\.bucket",
  "gcsfs": r"supra_jax\.bucket",
  "grain": r"supra_jax\.(data|checkpoint)",
  "tensorboardX": r"supra_jax\.metrics",
  "matplotlib": r"supra_jax\.picture",
  "absl": r"supra_jax\.bin\..*|convert_weights\..*",
  "torch": r"convert_weights\.(torch_file|verify|for_transformers\..*)",
  "transformers": r"convert_weights\.(verify|for_transformers\..*)",
}
KERNELS_MAY_IMPORT = {"jax", "numpy"}

# Distributions whose name is not that of what they install.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint"}


def _modules() -> dict[str, Path]:
  modules = {}
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      is_subpackage = parts[-1] == "__init__" and len(parts) > 2
      modules[".".join(parts[:-1] if is_subpackage else parts)] = path
  return modules


MODULES = _modules()


def _imports(module: str) -> Iterator[tuple[str, int]]:
  """Yields (what is imported, line), names of our own modules in full, wherever in the file it is written."""
  path = MODULES[module]
  package = path.relative_to(ROOT).parent.parts
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield _own(alias.name), node.lineno
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else ()
      source = ".".join([*above, *([node.module] if node.module else [])])
      for alias in node.names:
        # `from package import x`: x is a module of the package, or a name inside `source`.
        yield _own(f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source), node.lineno


def _own(name: str) -> str:
  return f"{name}.__init__" if name in PACKAGES else name


def _place(module: str) -> int:
  """How high a module of supra_jax stands; -1 where it is not listed."""
  if module in ORDER:
    return ORDER.index(module)
  return ORDER.index("supra_jax.bin.*") if re.match(r"supra_jax\.bin(\.|$)", module) else -1


def _is_third_party(name: str) -> bool:
  top = name.split(".")[0]
  return top not in PACKAGES and top not in sys.stdlib_module_names


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("supra_jax.")])
def test_module_is_listed(module):
  assert _place(module) >= 0, (
    f"{module} has no floor. List it under FLOORS in tests/test_house.py, on the lowest floor that has all it imports, "
    "after the modules it imports."
  )


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
  for name, line in _imports(module):
    where = f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
    target = name.split(".")[0]
    if module.startswith("kernels_pallas."):
      assert target == "kernels_pallas" or not _is_third_party(name) or target in KERNELS_MAY_IMPORT, where
      assert target not in PACKAGES[1:], f"{where}: kernels_pallas is the ground floor."
    elif module.startswith("convert_weights."):
      assert target != "kernels_pallas", where
      if target == "supra_jax":
        assert name in OPEN_TO_CONVERTERS, f"{where}: of supra_jax, converters use {sorted(OPEN_TO_CONVERTERS)} only."
    elif target == "convert_weights":
      assert module in USES_CONVERTERS, f"{where}: only {sorted(USES_CONVERTERS)} may."
    elif target == "supra_jax" and module != "supra_jax.bin":
      assert 0 <= _place(name) < _place(module), f"{where}, which FLOORS in tests/test_house.py lists above it."


@pytest.mark.parametrize("module", MODULES)
def test_reserved_packages(module):
  for name, line in _imports(module):
    allowed = RESERVED.get(name.split(".")[0], ".*")
    where = f"{MODULES[module].relative_to(ROOT)}:{line}"
    assert re.fullmatch(allowed, module), f"{where} imports {name}, which is for {allowed}."


def test_json_is_written_in_one_place():
  """Python's json writes NaN and infinities, which JSON does not have; `plain_json.to_json` writes null."""
  paths = [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py")]
  for path in set(paths) - {MODULES["supra_jax.plain_json"]}:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
        assert any(word.arg == "allow_nan" for word in node.keywords), f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_import_is_declared():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
  declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in lines}
  for module in MODULES:
    for name, line in _imports(module):
      top = name.split(".")[0]
      if _is_third_party(name):
        distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
        where = f"{MODULES[module].relative_to(ROOT)}:{line}"
        assert distribution in declared, f"{where} imports {top}; pyproject.toml does not name {distribution}."


def test_no_file_is_long():
  folders = (*PACKAGES, "tests", "configs", "benchmarks")
  lengths = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for folder in folders
    for path in (ROOT / folder).rglob("*.py")
  }
  assert {path: length for path, length in lengths.items() if length > 400} == {}
  programs = {path: length for path, length in lengths.items() if path.startswith("supra_jax/bin/")}
  assert {path: length for path, length in programs.items() if length > 60} == {}
