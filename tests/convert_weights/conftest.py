import pytest


@pytest.fixture(scope="session")
def exported_code(tmp_path_factory):
  """Where transformers copies exported code before it imports it. One place per process: it imports from the first."""
  dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
