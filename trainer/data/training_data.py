"""Opens the configuration's [data]: dataset, held-out split and order."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.format import CHANNELS, INDEX_NAME, MANIFEST_NAME, FormatError, load_manifest
from data_prep.output import STAGING_NAME
from trainer.config import Config, DataConfig
from trainer.config.backbones import classes_of, upsampler
from trainer.data.cache.download import exists, list_tars, remote_size
from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.dataset import MEMBER_OF, Dataset, InPlace, Shard
from trainer.data.datasets.indexed import IndexedDataset
from trainer.data.datasets.joined import JoinedDatasets
from trainer.data.datasets.labels import check_labels
from trainer.data.datasets.patterns import expand
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.datasets.tars import TarDataset
from trainer.data.datasets.unprepared import check_prepared
from trainer.data.decode import jpeg_signature
from trainer.data.orders.lanes import LanesOrder
from trainer.data.orders.mixture import MixtureOrder, member_seed
from trainer.data.orders.order import GlobalOrder, Order, Selected
from trainer.data.orders.windowed import WindowedOrder
from trainer.data.stream.stream import divisors
from trainer.errors import ConfigError, DataError

DATA_FINGERPRINT = "data (manifest)"  # its key in a run's identity
_WILDCARDS = set("*?[")


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A dataset, its training order, and the fingerprint of both, which must not change within a run.

    cache: None where the shards are read in place; held_out: (H,) int64, the ids that the order leaves out.
    """

    dataset: Dataset
    order: Order
    held_out: npt.NDArray[np.int64]
    cache: NodeCache | None
    identity: dict[str, Any]


def open_training_data(config: Config, *, index_folder: Path | None, nodes: int | None = None) -> TrainingData:
    """Open the data described by `config.data`.

    index_folder: where the indexes of tars are kept if there is no data.cache_dir; None for nowhere; nodes: number of
    training nodes, each reading its share of the lanes; None where unknown: at least one lane each. Raises ConfigError
    or DataError.
    """
    data = config.data
    cache = NodeCache(Path(data.cache_dir), data.cache_size) if data.cache_dir is not None else None
    opener = _Opener(config, cache, cache.files if cache is not None else index_folder)
    if data.path is not None:
        dataset: Dataset = (single := opener.open(data.path))
        _check_labels(config, {data.path: single})
        held_out, order = _split_and_order(config, single, config.seed)
    else:
        datasets = [opener.open(entry.path) for entry in data.mixture]
        _check_labels(config, {entry.path: one for entry, one in zip(data.mixture, datasets)})
        dataset = joined = JoinedDatasets(datasets)
        parts = [_split_and_order(config, one, member_seed(config.seed, k)) for k, one in enumerate(datasets)]
        held_out = np.concatenate([first + ids for first, (ids, _) in zip(joined.id_starts, parts)])
        order = _mixture(config, [order for _, order in parts], joined)
    if cache is not None:
        _check_cache_size(data, dataset, nodes)
    return TrainingData(
        dataset=dataset, order=order, held_out=held_out, cache=cache, identity=_identity(data, dataset.fingerprint)
    )


def _identity(data: DataConfig, fingerprint: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"data.order": data.order, "data.holdout": data.holdout, "data.cond": list(data.cond)}
    if data.order != "global":
        fields["data.window"] = data.window
    if data.order == "lanes":
        fields["data.lanes"] = data.lanes
    if data.mixture:
        fields["data.mixture weights"] = [entry.weight for entry in data.mixture]
    return {**fields, DATA_FINGERPRINT: fingerprint, "data (pixels of JPEGs)": jpeg_signature()}


def _check_labels(config: Config, datasets: dict[str, IndexedDataset]) -> None:
    classes = classes_of(config.model)
    if classes is not None and "label" in config.data.cond:
        check_labels(datasets, classes)


def _split_and_order(config: Config, dataset: IndexedDataset, seed: int) -> tuple[npt.NDArray[np.int64], Order]:
    """The held-out ids, and the order of the others."""
    data = config.data
    bounds = dataset.bounds
    if data.holdout:
        out = dataset.is_held_out(data.holdout)
        held_out, selected = np.flatnonzero(out), np.flatnonzero(~out).astype(np.uint32)
        if not len(held_out) or not len(selected):
            raise ConfigError(f"data.holdout = {data.holdout}: holds out {len(held_out)} of {len(dataset)} images")
        bounds = np.searchsorted(selected, bounds)
        return held_out, Selected(_order(config, np.diff(bounds), seed), selected)
    return np.empty(0, dtype=np.int64), _order(config, np.diff(bounds), seed)


def _order(config: Config, shard_sizes: npt.NDArray[np.int64], seed: int) -> Order:
    data, global_batch = config.data, config.train.global_batch
    if data.order == "windowed":
        return WindowedOrder(shard_sizes.tolist(), window=data.window, seed=seed)
    if data.order == "lanes":
        if global_batch % data.lanes:
            valid = divisors(global_batch)
            raise ConfigError(f"data.lanes = {data.lanes}: must divide train.global_batch; valid: {valid}")
        return LanesOrder(
            shard_sizes.tolist(), lanes=data.lanes, global_batch=global_batch, window=data.window, seed=seed
        )
    return GlobalOrder(int(shard_sizes.sum()), seed)


def _mixture(config: Config, orders: Sequence[Order], joined: JoinedDatasets) -> MixtureOrder:
    weights = [entry.weight for entry in config.data.mixture]
    try:
        return MixtureOrder(orders, weights=weights, id_starts=joined.id_starts.tolist(), seed=config.seed)
    except ValueError as error:
        raise ConfigError(f"data.mixture.weight: {error}") from error


def _check_cache_size(data: DataConfig, dataset: Dataset, nodes: int | None) -> None:
    """Raise ConfigError where the cache is so small that every shard would be downloaded again and again."""
    sizes = sorted((shard.bytes for shard in dataset.shards), reverse=True)
    at_once = max(1, len(data.mixture))  # orders that are read side by side
    if data.order == "lanes":
        at_once = math.ceil(data.lanes / (nodes or data.lanes))
    # For each, the window being read and the next one being prefetched.
    needed = sum(sizes) if data.order == "global" else sum(sizes[: 2 * data.window * at_once])
    if needed > data.cache_size:
        raise ConfigError(
            f"data.cache_size = {data.cache_size}: the order {data.order!r} keeps coming back to {needed} bytes of "
            'shards; give it more, or take "windowed" or "lanes" with a smaller data.window'
        )


class _Opener:
    """Opens paths and URLs of [data]."""

    def __init__(self, config: Config, cache: NodeCache | None, index_folder: Path | None) -> None:
        self.model = config.model
        self.cond = config.data.cond
        self.cache = cache
        self.index_folder = index_folder

    def open(self, path: str) -> IndexedDataset:
        """Open a dataset of data_prep, or plain tars. Raises DataError or ConfigError."""
        dataset = self._open_remote(path) if "://" in path else self._open_local(path)
        checks: list[tuple[str, int | None, int, str]] = [
            ("image_size", self.model.image_size, dataset.image_size, "images"),
            ("channels", self.model.channels, dataset.channels, "images"),
        ]
        enlarging, side = upsampler(self.model), dataset.stored.sides.get(MEMBER_OF["low_res"])
        if enlarging is not None and "low_res" in self.cond and side:  # plain tars do not say what they have
            checks.append(("low_res_size", enlarging.low_res_size, side, "low_res images"))
        for field, wanted, found, what in checks:
            if wanted != found:
                raise ConfigError(f"model.{field} = {wanted}: the {what} in {path} have {found}")
        return dataset

    def _open_local(self, path: str) -> IndexedDataset:
        folder = Path(path)
        if path.endswith(".tar"):
            return self._tars(path, [_local_shard(Path(name)) for name in expand(path)])
        ours = any((folder / name).exists() for name in (MANIFEST_NAME, INDEX_NAME, STAGING_NAME))
        tars = sorted(folder.glob("*.tar"))
        if tars and not ours:
            return self._tars(path, [_local_shard(tar) for tar in tars])
        if not ours:
            check_prepared(folder, image_size=self.model.image_size, channels=self.model.channels)
        return ShardedDataset(folder, files=self.cache, cond=self.cond)

    def _open_remote(self, url: str) -> IndexedDataset:
        if self.cache is None:
            raise ConfigError(f"data.path = {url}: needs data.cache_dir, a folder on a disk of each node")
        if url.endswith(".tar"):
            return self._tars(url, [_shard(name, *remote_size(name, self.cache.patience)) for name in expand(url)])
        url = url.rstrip("/")
        if exists(f"{url}/{MANIFEST_NAME}", self.cache.patience):
            return self._remote_manifest(url, self.cache)
        tars = list_tars(url, self.cache.patience)
        if not tars:
            raise DataError(f"{url}: holds neither {MANIFEST_NAME} nor tars")
        return self._tars(url, [_shard(name, *remote_size(name, self.cache.patience)) for name in tars])

    def _remote_manifest(self, url: str, cache: NodeCache) -> ShardedDataset:
        manifest = cache.keep_anew(f"{url}/{MANIFEST_NAME}", MANIFEST_NAME)
        try:
            promised = load_manifest(manifest.parent).index_sha256
        except FormatError as error:
            raise DataError(f"{url}: {error}") from error
        cache.keep(f"{url}/{INDEX_NAME}", f"{manifest.parent.name}/{INDEX_NAME}", promised)
        return ShardedDataset(manifest.parent, origin=url, files=cache, cond=self.cond)

    def _tars(self, where: str, shards: Sequence[Shard]) -> TarDataset:
        mode = next((mode for mode, channels in CHANNELS.items() if channels == self.model.channels), None)
        if mode is None:
            raise ConfigError(f"model.channels = {self.model.channels}: images in {where} have 1 or 3")
        return TarDataset(
            where,
            shards,
            image_size=self.model.image_size,
            mode=mode,
            files=self.cache or InPlace(),
            index_folder=self.index_folder,
            cond=self.cond,
        )


def _local_shard(path: Path) -> Shard:
    try:
        found = path.stat()
    except OSError as error:
        hint = "; for several tars give their folder, or {000..123} for numbers" if _WILDCARDS & set(str(path)) else ""
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}{hint}") from error
    return _shard(str(path), found.st_size, str(found.st_mtime_ns))


def _shard(url: str, size: int, stamp: str) -> Shard:
    digest = hashlib.sha256(f"{url}\n{size}\n{stamp}".encode()).hexdigest()
    return Shard(url=url, samples=0, bytes=size, digest=digest, verifiable=False)
