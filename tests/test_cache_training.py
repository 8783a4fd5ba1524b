"""Training through the cache of a node: the same as from the folder, whatever the settings."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cache_harness import wait_until
from tests.data_harness import image_of, images_of, write_tar
from tests.harness import events, launch, load_config, logged, make_dataset, overrides
from tests.server import FaultyServer, serving
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.training_data import open_training_data
from trainer.engine.step import train_step as step
from trainer.errors import ConfigError, DataError


def test_training_from_a_url_is_training_from_the_folder(
    server: FaultyServer, many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    """Manifest and index come from there too; two processes share one cache."""
    remote = overrides(data__path=server.url, data__cache_dir=tmp_path / "cache")
    launch(2, "--config", str(config_path), *remote)
    local = overrides(data__path=many_shards, run_dir=tmp_path / "local")
    launch(2, "--config", str(config_path), *local)
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "local"))
    assert max(count for name, count in server.gets.items() if name.endswith(".tar")) == 1
    assert server.gets["index.npy"] == 1


@dataclass(frozen=True)
class WaitsForShards:
    """In the place of a `Fault`: the first step waits until so many shards are in the cache."""

    cache: Path
    shards: int
    rank: int = 0

    def inject(self) -> None:
        original = step.device_batch

        def waiting(*arguments: Any) -> Any:
            step.device_batch = original
            wait_until(lambda: sum(not path.suffix for path in (self.cache / "shards").iterdir()) >= self.shards, 20)
            return original(*arguments)

        step.device_batch = waiting


def test_a_run_fetches_ahead_what_its_plan_will_need(server: FaultyServer, tmp_path: Path, config_path: Path) -> None:
    """Without loader processes nobody else would: a batch of 8 is in at most 4 windows of one shard each."""
    cache = tmp_path / "cache"
    settings = overrides(
        data__path=server.url, data__cache_dir=cache, data__order="windowed", data__window=1, data__workers=0
    )
    launch(1, "--config", str(config_path), *settings, fault=WaitsForShards(cache, 9))


def test_staging_a_folder_to_the_nodes_disk_is_the_same_cache(
    many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    config = load_config(config_path, f"data.path={many_shards}", f"data.cache_dir={tmp_path / 'cache'}")
    data = open_training_data(config, index_folder=None)
    local = ShardedDataset(many_shards)
    assert data.dataset.fingerprint == local.fingerprint
    assert all((image_of(data.dataset, n) == image_of(local, n)).all() for n in range(48))
    staged = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "shards").iterdir()}
    assert staged == {shard.digest: Path(shard.url).read_bytes() for shard in local.shards}


def test_tars_on_a_server_train_too(tmp_path: Path, config_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", images_of(7, first=10 * shard))
    with serving(folder) as server:
        settings = overrides(data__path=f"{server.url}/{{0..2}}.tar", data__cache_dir=tmp_path / "cache")
        launch(1, "--config", str(config_path), *settings)
        launch(1, "--config", str(config_path), *settings, *overrides(train__duration="8 steps"))
        assert dict(server.gets) == {f"{n}.tar": 1 for n in range(3)}
    assert [event["event"] for event in events(tmp_path / "run")].count("finished") == 2


def test_a_dataset_that_is_replaced_behind_its_url_leaves_running_jobs_alone(
    many_shards: Path, tmp_path: Path, config_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(many_shards, served)
    with serving(served) as server:
        config = load_config(config_path, f"data.path={server.url}", f"data.cache_dir={tmp_path / 'cache'}")
        first = open_training_data(config, index_folder=None).dataset
        expected = ShardedDataset(many_shards).index["label"].tolist()
        shutil.rmtree(served)
        make_dataset(tmp_path / "new", images=20, shard_samples=4).rename(served)
        second = open_training_data(config, index_folder=None).dataset
    assert (len(first), len(second)) == (48, 20)
    assert isinstance(first, ShardedDataset)
    again = ShardedDataset(first.folder, origin=first.where, files=first.files)
    assert again.index["label"].tolist() == expected


def test_settings_that_cannot_work_are_refused(
    server: FaultyServer, tmp_path: Path, config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"data\.path = http://.*: needs data\.cache_dir"):
        open_training_data(load_config(config_path, f"data.path={server.url}"), index_folder=None)
    remote = [f"data.path={server.url}", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(
        ConfigError, match=r"data\.cache_size = 50000: the order 'global' keeps coming back to \d+ bytes"
    ):
        open_training_data(load_config(config_path, *remote, "data.cache_size=50 kB"), index_folder=None)
    small_window = ["data.cache_size=60 kB", "data.order=windowed", "data.window=2"]
    open_training_data(load_config(config_path, *remote, *small_window), index_folder=None)
    wrong = load_config(config_path, f"data.path={server.url}/nowhere", remote[1])
    with pytest.raises(DataError, match="/nowhere: "):
        open_training_data(wrong, index_folder=None)
    # Not s3: where a test of this process has used it, fsspec goes on with the module that it imported.
    monkeypatch.setitem(sys.modules, "adlfs", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"abfs://bucket/set.*adlfs"):
        open_training_data(load_config(config_path, "data.path=abfs://bucket/set", remote[1]), index_folder=None)


def test_a_manifest_cannot_lead_out_of_the_cache(many_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(many_shards, copy)
    manifest = (copy / "manifest.json").read_text()
    digest = ShardedDataset(many_shards).shards[0].digest
    for old, new in ((digest, "../../escaped"), ("shard-000000.tar", "../shard-000000.tar")):
        (copy / "manifest.json").write_text(manifest.replace(old, new))
        with pytest.raises(DataError, match="the manifest names a shard"):
            ShardedDataset(copy)
