"""Datasets in buckets of s3, gs and hf, on local servers: through the cache they are the local ones.

moto serves s3 and gcp-storage-emulator gs, both written by others; the Hub's few answers are `tests/hub.py`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data_harness import expected, images_of, streamed_under_torchrun, write_tar
from tests.harness import REPOSITORY, environment, free_port, make_dataset
from tests.hub import REPOSITORY as HUB_REPOSITORY
from tests.hub import serving_hub


@dataclass(frozen=True)
class Bucket:
    """`url` has the dataset `shards` and the tars `tars/*.tar`; `settings` are the environment that leads there."""

    url: str
    settings: dict[str, str]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images in three shards of data_prep's, and 8 in two tars of nobody's."""
    folder = tmp_path_factory.mktemp("content")
    make_dataset(folder / "made").rename(folder / "shards")
    (folder / "tars").mkdir()
    for shard in range(2):
        write_tar(folder / "tars" / f"{shard}.tar", images_of(4, first=4 * shard))
    return folder


OTHERS = [pytest.param(other, marks=pytest.mark.slow) for other in ("gs", "hf")]


@pytest.fixture(scope="module", params=["s3", *OTHERS])
def bucket(request: pytest.FixtureRequest, content: Path) -> Iterator[Bucket]:
    if request.param == "hf":
        with serving_hub(content) as endpoint:
            yield Bucket(f"hf://datasets/{HUB_REPOSITORY}", {"HF_ENDPOINT": endpoint})
        return
    port = free_port()
    if request.param == "s3":
        command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        settings |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    else:
        command = ["-m", "gcp_storage_emulator", "start", "--in-memory", "--host", "127.0.0.1", "--port", str(port)]
        settings = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as server:
        try:
            upload = UPLOAD.format(protocol=request.param, folder=str(content))
            subprocess.run([sys.executable, "-c", upload], check=True, timeout=120, env=environment(**settings))
            yield Bucket(f"{request.param}://bucket", settings)
        finally:
            server.terminate()


UPLOAD = """
import time, fsspec
deadline = time.monotonic() + 60
while True:
    try:
        bucket = fsspec.filesystem("{protocol}")
        bucket.mkdir("bucket")
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
for name in ("shards", "tars"):
    bucket.put("{folder}/" + name, "bucket/" + name, recursive=True)
"""


def config_for(config_path: Path, path: str, cache: Path) -> Path:
    lines = [line for line in config_path.read_text().splitlines() if not line.startswith("path =")]
    config = config_path.with_name(f"{cache.name}.toml")
    config.write_text("\n".join(lines).replace("[data]", f'[data]\npath = "{path}"\ncache_dir = "{cache}"'))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("ways", [["global:fork:1"], pytest.param(["windowed:spawn:1"], marks=pytest.mark.slow)])
def test_a_bucket_streams_as_its_folder_does(
    bucket: Bucket, content: Path, config_path: Path, tmp_path: Path, ways: list[str]
) -> None:
    """Two ranks under torchrun, each with a loader process, and one cache."""
    local = config_for(config_path, str(content / "shards"), tmp_path / "local")
    remote = config_for(config_path, f"{bucket.url}/shards", tmp_path / "cache")
    assert streamed_under_torchrun(2, remote, *ways, **bucket.settings) == [expected(local, way) for way in ways]
    fetched = {path.read_bytes() for path in (tmp_path / "cache" / "shards").iterdir()}
    assert fetched == {path.read_bytes() for path in (content / "shards").glob("shard-*.tar")}


READ = """
import json, sys
from pathlib import Path
from tests.data_harness import expected
from trainer.errors import TrainerError
try:
    print(json.dumps(expected(Path(sys.argv[1]), "windowed:fork:0")))
except TrainerError as error:
    print(f"error: {error}")
"""


def read(config: Path, bucket: Bucket) -> str:
    """The samples of a stream as JSON, or what was wrong; in a process that finds its way to the bucket."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(config)],
        cwd=REPOSITORY,
        env=environment(**bucket.settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_tars_in_a_bucket_are_found_and_read(bucket: Bucket, content: Path, config_path: Path, tmp_path: Path) -> None:
    local = config_for(config_path, str(content / "tars"), tmp_path / "local")
    found = json.loads(read(config_for(config_path, f"{bucket.url}/tars", tmp_path / "cache"), bucket))
    assert [tuple(sample) for sample in found] == expected(local, "windowed:fork:0")
    assert len({image for _, _, image in found}) == 8


@pytest.mark.slow
def test_what_is_not_in_a_bucket_is_one_line(bucket: Bucket, config_path: Path, tmp_path: Path) -> None:
    said = read(config_for(config_path, f"{bucket.url}/nothing", tmp_path / "cache"), bucket)
    assert said.startswith(f"error: {bucket.url}/nothing: ")
    assert len(said.splitlines()) == 1
    assert not list((tmp_path / "cache" / "shards").iterdir())
