"""Which lock a run reads its remote sources from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.config.data import DataConfig
from pretrain.data.catalog import Catalog, Locked, resolve_sources
from pretrain.data.described import CatalogSource
from pretrain.data.lock import Lock, journal_of, load_lock, lock_of, locked_sources, remote_paths, save_lock, unresolved
from pretrain.data.mirror import check_mirror
from pretrain.run.folder import RunFolder


def lock_of_run(config: DataConfig, folder: RunFolder, say: Callable[[str], None]) -> Locked:
    """Return the remote sources of a run: from `data.lock`, else from the run folder, else resolved now.

    Args:
        config: the sources.
        folder: the run folder. A lock that is resolved now is kept there when training starts (`keep_lock`).
        say: prints a line for each source that is resolved.

    Raises:
        DataError: the lock cannot be read, it does not fit the config, or the sources cannot be resolved; or the
            mirror lacks files.

    """
    return lock_of_folder(config, folder.data_lock, say)


def lock_of_folder(config: DataConfig, kept: Path, say: Callable[[str], None]) -> Locked:
    """Return the remote sources of a config: from `data.lock`, else from the lock `kept`, else resolved now.

    Raises:
        DataError: see `lock_of_run`.

    """
    if not remote_paths(config):
        return {}
    found = _saved(config, kept)
    if found is None:
        say("the remote sources have no lock yet: resolving them")
        found = locked_sources(resolve_sources(config, journal_of(kept), say), config, "the resolved lock")
    if config.mirror is not None:
        check_mirror(Lock(found).files, Path(config.mirror))
    return found


def lock_of_check(config: DataConfig, folder: RunFolder, online: bool) -> Locked:
    """Return the remote sources of a config that is only checked, which writes nothing.

    Args:
        config: the sources.
        folder: the run folder; need not exist.
        online: whether sources without a lock are resolved; if not, they are returned without their files.

    Raises:
        DataError: the lock cannot be read, it does not fit the config, or the sources cannot be resolved.

    """
    found = _saved(config, folder.data_lock)
    if found is not None:
        return found
    return locked_sources(resolve_sources(config), config, "the resolved lock") if online else unresolved(config)


def keep_lock(catalog: Catalog, folder: RunFolder) -> None:
    """Save what is known of the remote sources of a run in its folder, from which a resume reads it.

    Raises:
        DataError: it cannot be written.

    """
    remote = [source for source in catalog.sources if source.pinned is not None]
    if remote:
        save_lock(lock_of(remote), folder.data_lock)
        journal_of(folder.data_lock).unlink(missing_ok=True)


def _saved(config: DataConfig, kept: Path) -> dict[str, CatalogSource] | None:
    if config.lock is None and not kept.exists():
        return None
    path = Path(config.lock) if config.lock is not None else kept
    return locked_sources(load_lock(path), config, path)
