"""A server of Google Cloud Storage's API on this machine, `python -m tests.support.gcs PORT`: its files are in memory.

gcp-storage-emulator, with what the API says of generations: tensorstore writes an object only where it is as it was
when it was read, and has to be told which one it reads.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from unittest import mock

from benchmarks import runs

BUCKET = "bucket"


@contextlib.contextmanager
def running(cache: Path) -> Iterator[None]:
  """Serves while it lasts, to this process and to those that it starts; what they copy goes into `cache`."""
  url = f"http://127.0.0.1:{(port := runs.free_port())}"
  names = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "XDG_CACHE_HOME": str(cache)}
  # Or gcsfs asks Google for the kind of the bucket.
  names["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
  server = subprocess.Popen(
    [sys.executable, "-m", "tests.support.gcs", str(port)],
    cwd=runs.ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    for _ in range(300):
      with contextlib.suppress(OSError), urllib.request.urlopen(url):
        break
      time.sleep(0.1)
    with mock.patch.dict(os.environ, names):
      yield
  finally:
    server.kill()
    server.wait()


def _serve(port: int) -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.exceptions import NotFound

  def with_generations(handler):
    def handle(request, response, storage):
      query = {name: values[0] for name, values in request.query.items()}
      generation = "0"
      with contextlib.suppress(NotFound):
        name = request.params.get("object_id", query.get("name"))
        generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
      if query.get("ifGenerationMatch", generation) != generation:
        response.status = HTTPStatus.PRECONDITION_FAILED
      elif generation != "0" and query.get("ifGenerationNotMatch") == generation:
        response.status = HTTPStatus.NOT_MODIFIED
      else:
        response["x-goog-generation"] = generation
        handler(request, response, storage)

    return handle

  server.HANDLERS = tuple(
    (path, {method: with_generations(handler) for method, handler in handlers.items()} if "/o" in path else handlers)
    for path, handlers in server.HANDLERS
  )
  server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
  _serve(int(sys.argv[1]))
