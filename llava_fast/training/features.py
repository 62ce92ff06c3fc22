"""A frozen tower's features, computed once per picture and kept on disk for later epochs, runs and ranks.

A feature is a file <folder>/<tower>/<ab>/<key>: the raw numbers of [P, E]. `tower` is a hash of the tower's weights, its configuration, the
normalisation and the dtype; `key` a hash of the view's bytes. Files appear whole (written beside their place and renamed), so that any
number of processes may share a folder; the loader's threads read them, the step computes and writes what is missing. <folder>/.used is the
size of all of them, for those that have a limit to keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from llava_fast.batch import Features
from llava_fast.training.batches import Dataset, Example, Row

log = logging.getLogger(__name__)
SAMPLED = 1 << 14  # values of a tensor that it is recognised by


def weights_fingerprint(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """A hash of names, shapes, dtypes and SAMPLED values or a few more of each tensor; dtype: what they will be turned into first."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in named:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(repr((name, list(tensor.shape), str(sample.dtype))).encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Features of a model's tower under `folder`, which holds at most `gigabytes`, of all towers and from whatever number of processes
    (None: as the disk has room)."""

    def __init__(self, folder: str | os.PathLike, model: Any, gigabytes: float | None = None):
        config = model.config
        options = (config.vision, config.feature_layers, config.drop_class, model.image_mean, model.image_std, model.image_rescale)
        weight = next(model.vision_tower.parameters())  # of a sharded model the tower alone is whole, in its dtype and place
        device = weight.device.type
        self.dtype = torch.promote_types(weight.dtype, torch.float32) if device == "cpu" else weight.dtype
        identity = (weights_fingerprint(model.vision_tower.named_parameters()), options, str(self.dtype), device)
        self.folder = Path(folder) / hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
        self.shape = (config.patches, config.vision.width * len(config.feature_layers))
        self.bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        self.full, self.limit = False, None if gigabytes is None else gigabytes * 1e9
        self.used, self.lock = Path(folder) / ".used", FileLock(Path(folder) / ".lock")
        if self.limit is not None:
            with self.lock:
                self._count(_bytes_under(Path(folder)))

    def keys(self, views: Tensor) -> list[str]:
        """The name of each view, uint8 [N, 3, S, S] on the CPU."""
        return [hashlib.blake2b(view.tobytes(), digest_size=16).hexdigest() for view in views.numpy()]

    def read(self, key: str, into: Tensor) -> bool:
        """Fill [P, E] with the view's features; False where they are not there. A file of another size counts as none."""
        try:
            raw = np.fromfile(self._file(key), dtype=np.uint8)
        except FileNotFoundError:
            return False
        if len(raw) != self.bytes:
            return False
        into.copy_(torch.from_numpy(raw).view(self.dtype).view(self.shape))
        return True

    def write(self, keys: Iterable[str], rows_MPE: Tensor) -> None:
        """Keep features under their names, while there is room; a full disk ends the keeping, not the run.

        Where there is a limit, one process writes at a time, and all know how much there is.
        """
        try:
            with self.lock if self.limit is not None else contextlib.nullcontext():
                used = self._counted() if self.limit is not None else 0
                for key, rows in zip(keys, rows_MPE.detach().to("cpu", self.dtype), strict=True):
                    if self.full or (self.limit is not None and used + self.bytes > self.limit):
                        break
                    used += self._write(self._file(key), rows)
                if self.limit is not None:
                    self._count(used)
        except OSError as error:
            log.warning("%s takes no more features (%s): the rest is computed every time", self.folder, error.strerror or error)
            self.full = True

    def _count(self, used: int) -> None:
        partial = self.used.with_name(f"{self.used.name}-{os.getpid()}")
        partial.write_text(str(used))
        os.replace(partial, self.used)

    def _counted(self) -> int:
        try:
            return int(self.used.read_text())
        except (ValueError, FileNotFoundError):  # a machine that went down, somebody who cleaned up
            return _bytes_under(self.used.parent)

    def _write(self, file: Path, rows_PE: Tensor) -> int:
        """The bytes by which the folder has grown."""
        grown = self.bytes - (file.stat().st_size if file.exists() else 0)  # it may be there by now, or have another size
        partial = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(exist_ok=True)
            rows_PE.contiguous().view(torch.uint8).numpy().tofile(partial)
            os.replace(partial, file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return grown

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _bytes_under(folder: Path) -> int:
    """Of finished files: what others write, or take away meanwhile, is not there."""
    total = 0
    for file in folder.glob("*/*/[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


class CachedData:
    """A `Dataset` whose examples bring the features that are in the cache, and of their views only the others."""

    def __init__(self, data: Dataset, cache: FeatureCache):
        self.data, self.cache = data, cache

    def __getattr__(self, name: str) -> Any:  # what a data set may know besides: its samples' names and scenarios
        return getattr(self.data, name)

    @property
    def tokens(self) -> np.ndarray:
        return self.data.tokens

    @property
    def views(self) -> np.ndarray:
        return self.data.views

    @property
    def fingerprint(self) -> int:
        return self.data.fingerprint

    def load(self, index: int) -> Example:
        example = self.data.load(index)
        if example.views is None or not len(example.views):
            return example
        keys = self.cache.keys(example.views)
        rows = torch.zeros(len(keys), *self.cache.shape, dtype=self.cache.dtype)
        missing = [i for i, key in enumerate(keys) if not self.cache.read(key, rows[i])]
        features = Features(rows, torch.tensor(missing, dtype=torch.int64), tuple(keys[i] for i in missing))
        return dataclasses.replace(example, views=example.views[missing] if missing else None, features=features)


class CachedObjective:
    """An `Objective` that fills in the features a row lacks, and keeps them, before another one sees the row."""

    def __init__(self, objective: Any, cache: FeatureCache):
        self.objective, self.cache = objective, cache
        self.weight = objective.weight

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(model, self.filled(model, row))

    def filled(self, model: Any, row: Row) -> Row:
        """The row with all its features; those that were not in the cache are from now on."""
        batch = row.batch
        if batch.features is None:
            return row
        rows, missing, keys = batch.features.rows, batch.features.missing, batch.features.keys
        if batch.views is not None:
            found = {}
            for key in dict.fromkeys(keys):  # what an earlier step wrote while the loader was ahead of it
                into = torch.empty(self.cache.shape, dtype=self.cache.dtype)
                if self.cache.read(key, into):
                    found[key] = into.to(rows.device)
            fresh = [i for i, key in enumerate(keys) if key not in found and keys.index(key) == i]
            if fresh:
                names, made = [keys[i] for i in fresh], model.features(batch.views[fresh])
                self.cache.write(names, made)
                found |= zip(names, made, strict=True)
            rows = rows.index_copy(0, missing, torch.stack([found[key] for key in keys]))
        known = Features(rows, missing[:0])
        return dataclasses.replace(row, batch=dataclasses.replace(batch, views=None, features=known))
