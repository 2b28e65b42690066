"""Holds the code to its house: which room may import which, and how long a file may grow."""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels_pallas", "supra_jax", "convert_weights", "configs", "benchmarks", "tests")

# Room -> the rooms that it may import, beside itself. A room is a folder of supra_jax, or a package. Where only some
# modules of another room are open, these are named.
MODEL = ("core", "model", "kernels_pallas")
ARROWS: dict[str, tuple[str, ...]] = {
  "kernels_pallas": (),
  "core": (),
  "model": ("core", "kernels_pallas"),
  "objectives": MODEL,
  "storage": ("core", "model"),
  "data": ("core", "model.config"),
  "linearization": (*MODEL, "objectives", "storage", "data"),
  "training": (*MODEL, "objectives", "storage", "data"),
  "inference": (*MODEL, "objectives", "storage", "data"),
  "evaluation": (*MODEL, "objectives", "storage", "data", "inference"),
  "analysis": ("core", "model", "inference"),
}
LIBRARY = tuple(ARROWS)
ARROWS |= {
  "experiments": LIBRARY,
  "supra_jax": LIBRARY,  # `__init__`, the front door, which imports what is asked for when it is asked for
  "convert_weights": (
    "core", "model.config", "model.registry", "model.mixers.softmax", "model.mixers.supra", "model.mixers.supra_window",
    "model.mixers.memory", "model.mixers.lolcats", "model.mixers.t2r", "model.mixers.mamba", "model.rope",
    "model.finite", "storage", "data.tokenizer", "data.tokenizer_backends", "inference.lm", "bin.entry",
  ),
  "bin": (*LIBRARY, "experiments", "convert_weights", "supra_jax"),
  "configs": LIBRARY,
  "benchmarks": (*LIBRARY, "experiments", "bin", "convert_weights", "configs", "supra_jax"),
  "tests": (*LIBRARY, "experiments", "bin", "convert_weights", "configs", "supra_jax", "benchmarks"),
}  # fmt: skip

# Packages that only some modules may import.
RESERVED = {
  "orbax": r"supra_jax\.storage\..*",
  "etils": r"supra_jax\.core\.(bucket|files)",
  "fsspec": r"supra_jax\.core\.bucket",
  "gcsfs": r"supra_jax\.core\.bucket",
  "grain": r"supra_jax\.data\.loading",
  "tensorboard": r"supra_jax\.training\.metrics",
  "matplotlib": r"supra_jax\.(training|evaluation|analysis|experiments)\.pictures",
  "absl": r"supra_jax\.bin\..*|convert_weights\..*",
  "torch": r"convert_weights\.(torch_file|verify|for_transformers\..*)|supra_jax\.evaluation\.comparison",
  "lm_eval": r"supra_jax\.(evaluation\.(harness|tasks|comparison)|bin\.lm_eval)",
  "transformers": r"convert_weights\.(verify|for_transformers\..*)",
}
# Rooms without jax, since processes that only pack text import them.
WITHOUT_JAX = r"supra_jax\.(__init__|core\.(plain_json|schema|files|bucket|preemption|progress|programs|xla_gpu)"
WITHOUT_JAX += r"|data\.(?!loading).*"
WITHOUT_JAX += r"|model\.(__init__|config|registry))"
KERNELS_MAY_IMPORT = {"jax", "numpy"}

# Distributions whose name is not that of what they install.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "lm_eval": "lm-eval"}
# Declared for what others import on our behalf: jax[cuda12] and the like, and a plug-in of fsspec.
NOT_IMPORTED = {
  "jax-cuda12-plugin", "libtpu", "nvidia-cuda-nvcc-cu12", "accelerate", "gcsfs", "fsspec", "pyarrow",
}  # fmt: skip


def _modules() -> dict[str, Path]:
  modules = {}
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      modules[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
  return modules


MODULES = _modules()
SHIPPED = [name for name in MODULES if name.split(".")[0] in ("kernels_pallas", "supra_jax", "convert_weights")]


def room_of(module: str) -> str:
  """`supra_jax.model.mixers.supra` -> `model`, `convert_weights.names` -> `convert_weights`."""
  top, *below = module.split(".")
  return below[0] if top == "supra_jax" and len(below) > 1 else top


def _imports(module: str) -> Iterator[tuple[str, int, bool]]:
  """Yields (what is imported, line, whether on import of the module); names of our own modules in full."""
  path = MODULES[module]
  package = path.relative_to(ROOT).parent.parts
  tree = ast.parse(path.read_text(), str(path))
  late = {
    inner
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    for inner in ast.walk(node)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield _own(alias.name), node.lineno, node not in late
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else ()
      source = ".".join([*above, *([node.module] if node.module else [])])
      for alias in node.names:
        # `from package import x`: x is a module of the package, or a name inside `source`.
        inner = _own(f"{source}.{alias.name}")
        yield inner if inner in MODULES else _own(source), node.lineno, node not in late


def _own(name: str) -> str:
  return f"{name}.__init__" if f"{name}.__init__" in MODULES else name


def _is_third_party(name: str) -> bool:
  top = name.split(".")[0]
  return top not in PACKAGES and top not in sys.stdlib_module_names


def _may_import(room: str, target: str) -> bool:
  """Whether a room's modules may import a module of ours."""
  other = room_of(target)
  short = target.removeprefix("supra_jax.")
  return other == room or other in ARROWS[room] or short in ARROWS[room]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
  room = room_of(module)
  assert room in ARROWS, f"{module} is in no room: give {room} a line in ARROWS of tests/test_house.py."
  for name, line, _ in _imports(module):
    where = f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
    if name.split(".")[0] in PACKAGES and name in MODULES:
      assert _may_import(room, name), f"{where}; {room} may import {', '.join(ARROWS[room]) or 'nothing'}."
    elif room == "kernels_pallas" and _is_third_party(name):
      assert name.split(".")[0] in KERNELS_MAY_IMPORT, where


def test_no_module_imports_itself_by_way_of_others():
  graph = {module: {name for name, _, at_once in _imports(module) if at_once and name in MODULES} for module in SHIPPED}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", SHIPPED)
def test_reserved_packages(module):
  for name, line, at_once in _imports(module):
    top, where = name.split(".")[0], f"{MODULES[module].relative_to(ROOT)}:{line}"
    allowed = RESERVED.get(top, ".*")
    assert re.fullmatch(allowed, module), f"{where} imports {name}, which is for {allowed}."
    if at_once and re.fullmatch(WITHOUT_JAX, module):
      assert top not in ("jax", "flax", "optax", "orbax"), f"{where}: processes that only pack text import this."


def test_json_is_written_in_one_place():
  """Python's json writes NaN and infinities, which JSON does not have; `plain_json.to_json` writes null."""
  paths = [MODULES[module] for module in SHIPPED] + list((ROOT / "benchmarks").glob("*.py"))
  for path in set(paths) - {MODULES["supra_jax.core.plain_json"]}:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
        assert any(word.arg == "allow_nan" for word in node.keywords), f"{path.relative_to(ROOT)}:{node.lineno}"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  shipped = [*project["dependencies"], *(line for extra, lines in extras.items() if extra != "dev" for line in lines)]
  declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in shipped}
  imported = set()
  for module in SHIPPED:
    for name, line, _ in _imports(module):
      top = name.split(".")[0]
      if _is_third_party(name):
        distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
        imported.add(distribution)
        where = f"{MODULES[module].relative_to(ROOT)}:{line}"
        assert distribution in declared, f"{where} imports {top}; pyproject.toml does not name {distribution}."
  assert declared - imported - NOT_IMPORTED == set(), "Declared in pyproject.toml, and imported nowhere."


def test_no_file_is_long():
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
  assert {path: length for path, length in lengths.items() if length > 400} == {}
  programs = {path: length for path, length in lengths.items() if path.startswith("supra_jax/bin/")}
  assert {path: length for path, length in programs.items() if length > 60} == {}
