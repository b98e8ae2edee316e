"""The names under a bucket's prefix: names <-> key prefixes, listings, folders.

A database with prefix `a/b.sqlite` is the file `a/b.sqlite`; one whose last part has no dot (`tenants/acme`) is shown
as `tenants/acme.sqlite` and found under both names, unless its head records that it was created under its exact name.
Exact names win. Prefixes above databases are folders. An object whose name ends like a database's is shown as well, to
be read only, unless there is a database of that name.

Thread rule: any thread; `_lock` is never held during a request to the store."""

import errno
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakValueDictionary

from cachetools import LRUCache

from s3blockfs import errors, objectfile
from s3blockfs.cache import BlockCache
from s3blockfs.capabilities import ensure_safe, is_known_safe
from s3blockfs.config import Config
from s3blockfs.dirty import spill_folder
from s3blockfs.diskcache import DiskCache
from s3blockfs.format import keys
from s3blockfs.format.keys import check_prefix, deleted_mark_key, is_prefix, join
from s3blockfs.glances import Glances
from s3blockfs.legacy import AnyHead
from s3blockfs.objectstore import Listed, ObjectStore
from s3blockfs.runtime import Runtime
from s3blockfs.sidefiles import JOURNAL_SUFFIX, SideFiles, is_side_file
from s3blockfs.snapshot import Source, Version

#: Names with these endings are taken for databases in listings without looking.
DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db", ".db3", ".s3db", ".sl3")
SHOWN_SUFFIX = ".sqlite"

HEADS_KEPT = 64  # for the time between a look and an open
PROBES_KEPT = 100_000  # names known to be folders or not


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for. Size in bytes, time in seconds by the store's clock; both 0 where not looked up."""

    prefix: str
    is_folder: bool
    size: int = 0
    modified_s: float = 0.0
    shown_as: str | None = None  # the name in a listing, where it is another one than was asked for
    is_fixed: bool = False  # cannot be changed: of the past, or a plain object


class Names:
    """The names under `root`, a key prefix without slashes at its ends ("" is the whole bucket)."""

    def __init__(self, store: ObjectStore, runtime: Runtime, config: Config, root: str) -> None:
        self._store, self._runtime, self._config, self._root = store, runtime, config, root
        ahead_bytes = config.cache_size * 7 // 8 if config.readahead_size else 0
        disk = None if config.cache_dir is None else DiskCache(config.cache_dir, config.cache_dir_size, runtime)
        self._cache = BlockCache(store, runtime, config.cache_size, 2 * config.request_deadline_s, ahead_bytes, disk)
        self._lock = threading.Lock()
        self._heads: LRUCache[str, tuple[Version | None, float]] = LRUCache(HEADS_KEPT)
        self._head_files: WeakValueDictionary[str, AnyHead] = WeakValueDictionary()
        self._objects: LRUCache[str, tuple[Listed | None, float]] = LRUCache(PROBES_KEPT)
        self._folders: LRUCache[str, float] = LRUCache(HEADS_KEPT)
        self._probed: LRUCache[str, bool] = LRUCache(PROBES_KEPT)
        self._glances = Glances(store, runtime, config.refresh_s)
        self._safe = config.only_writer
        self.side_files = SideFiles(spill_folder(config.spill_dir))

    def lookup(self, path: str) -> Entry | None:
        """What `path` (relative to the root, no slash at its start) is, or None."""
        if path == "":
            return Entry(self._root, is_folder=True)
        if not is_prefix(prefix := join(self._root, path)):
            return None
        with self._lock:
            known = (self._heads.get(prefix) or (None,))[0]
        if (known is None or known.head.deleted) and self._is_used_below(prefix):  # without asking: also in an outage
            return Entry(prefix, is_folder=True)
        if (plain := self._object(prefix, look=False)) is not None:  # from a LIST, perhaps: those need no look each
            return _plain(plain)
        if known is None and self._shown(prefix) is None and (seen := self._glances.take(prefix)) is not None:
            return Entry(prefix, False, seen[0], seen[1] / 1000)
        version = self._head(prefix)
        if version is not None and not version.head.deleted:
            entry, name = _entry(prefix, version), path.rpartition("/")[2]
            if "." in name or version.head.name is not None:
                return entry
            hidden = self._head(prefix + SHOWN_SUFFIX) is not None
            return entry if hidden else replace(entry, shown_as=name + SHOWN_SUFFIX)
        if version is None and (alias := undotted(path)) is not None:
            version = self._head(other := join(self._root, alias))
            if version is not None and not version.head.deleted and version.head.name is None:
                return _entry(other, version)
        if path.endswith(DATABASE_SUFFIXES):
            return _plain(found) if (found := self._object(prefix)) else None
        return Entry(prefix, is_folder=True) if version is None and self._is_folder_lately(path) else None

    def detailed(self, path: str, entry: Entry) -> Entry:
        """What a listing found at `path`, with size and time."""
        if entry.is_folder or entry.is_fixed:
            return entry
        seen = self._glances.look(entry.prefix)
        return (self.lookup(path) or entry) if seen is None else replace(entry, size=seen[0], modified_s=seen[1] / 1000)

    def listing(self, folder: str) -> list[tuple[str, Entry]]:
        """(name, entry) of everything in a folder, sorted. Two LISTs, and a look at each name that needs one."""
        base = join(self._root, folder)
        start = f"{base}/" if base else ""
        marks_start = f"{deleted_mark_key(base, '')}/"
        marks = self._runtime.submit(lambda: list(self._store.list(marks_start, site="list-deleted")))
        now, listed = self._runtime.monotonic(), list(self._store.list(start, site="list", delimiter="/"))
        names = [each.key[len(start) : -1] for each in listed if each.is_prefix and is_prefix(each.key[:-1])]
        marked = {mark.key[len(marks_start) :] for mark in marks.result()}
        found: dict[str, Entry] = {}
        unclear: dict[str, Future[Version | None]] = {}
        journals = {name + JOURNAL_SUFFIX for name in names}  # left by sqlite-s3vfs
        with self._lock:  # a look-up is a change of an LRUCache
            folders = {name for name in names if self._probed.get(start + name) is False}
        for name in set(names) - journals:
            prefix = start + name
            if name.endswith(DATABASE_SUFFIXES) and name not in marked:
                found[name] = Entry(prefix, is_folder=False)
            elif name in folders and name not in marked:
                found[name] = Entry(prefix, is_folder=True)
            else:
                unclear[name] = self._runtime.submit(partial(self._head, prefix))
        for name, future in unclear.items():
            try:
                version = future.result()
            except errors.UNUSABLE:
                found[name] = Entry(start + name, is_folder=False)  # using it says what is wrong
                continue
            with self._lock:
                self._probed[start + name] = version is not None
            if version is None:
                if name not in marked or self._is_folder(join(folder, name)):
                    found[name] = Entry(start + name, is_folder=True)
            elif not version.head.deleted:
                exact = "." in name or version.head.name is not None or name + SHOWN_SUFFIX in names
                found[name if exact else name + SHOWN_SUFFIX] = _entry(start + name, version)
        for each in listed:
            name = each.key[len(start) :]
            if name.endswith(DATABASE_SUFFIXES) and is_prefix(each.key) and name not in found:
                found[name] = _plain(each)
                with self._lock:
                    self._objects[each.key] = each, now
        rows = sorted(found.items())
        shown = (e for name, e in rows if "." in name and e.prefix == start + name)
        self._glances.listed([entry.prefix for entry in shown if not (entry.is_folder or entry.is_fixed)])
        return rows

    def find(self, path: str) -> tuple[Source, AnyHead, Version]:
        """The newest state of a database, for commands. Raises DatabaseNotFound."""
        began_s = self._runtime.monotonic()
        if (entry := self.lookup(path)) is not None and not entry.is_folder:
            self._require_database(entry)
            source, heads = self.at(entry.prefix)
            with self._lock:
                version, asked_s = self._heads.get(entry.prefix, (None, began_s))
            version = version if asked_s > began_s else heads.read()
            if version is not None and not version.head.deleted:
                return source, heads, version
        raise errors.DatabaseNotFound(f"{self._label(path)}: no such database")

    def _require_database(self, entry: Entry) -> None:
        if entry.is_fixed:
            name = f"{self._store.name}/{entry.prefix}"
            raise errors.ReadOnly(f"{name}: a plain object, read-only; `s3blockfs import {name} BUCKET/NAME` stores it")

    def at(self, prefix: str) -> tuple[Source, AnyHead]:
        """Of a whole key prefix, whatever is there."""
        return self._source(prefix), self._head_file(prefix)

    def make_folder(self, path: str) -> None:
        """Remembered by a mark in it. Raises DatabaseExists for any name in use, UsageError for one that cannot be."""
        if self.lookup(path) is not None:
            raise errors.DatabaseExists(f"{self._label(path)}: exists")
        check_prefix(prefix := join(self._root, path))
        if path.endswith(DATABASE_SUFFIXES) or is_side_file(path) or self._head(prefix) is not None:
            raise errors.UsageError(f"{self._label(path)}: a name of databases or one that was deleted; choose another")
        self.require_writable()
        self._store.put(keys.folder_mark_key(prefix), b"", site="mark-folder")

    def remove_folder(self, path: str) -> None:
        """Raises DatabaseNotFound when there is no such folder, OSError (ENOTEMPTY; EBUSY for the root)."""
        if (entry := self.lookup(path)) is None:
            raise errors.DatabaseNotFound(f"{self._label(path)}: no such folder")
        if not entry.is_folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if not path:
            raise OSError(errno.EBUSY, "the root is not removed: unmount it")
        self.require_writable()
        if self.listing(path) or self.side_files.names_under(path):
            raise OSError(errno.ENOTEMPTY, f"{self._label(path)}: not empty")
        parent, _, name = entry.prefix.rpartition("/")
        # What was deleted in it leaves tombstones, and some stores list empty prefixes for a while.
        self._store.put(deleted_mark_key(parent, name), b"", site="mark-deleted")
        self._store.delete([keys.folder_mark_key(entry.prefix)], site="unmark-folder")
        with self._lock:
            self._folders.pop(entry.prefix, None)

    def require_writable(self, prefix: str = "") -> None:
        """Raises ReadOnly, or what the probe of the store raises; asks the store once in a process's life: at the root,
        or beside a database with this prefix where that is the whole bucket, which may be out of bounds."""
        if self._config.read_only:
            raise errors.ReadOnly(f"{self._label('')}: mounted read-only")
        if not self._safe:
            ensure_safe(self._store, self._root or prefix.rpartition("/")[0], self._runtime)
            self._safe = True

    def learn_if_safe(self) -> None:
        """Look whether the store is known to be, so that whoever opens a file first, be it to read, has not to wait."""
        if not self._config.read_only:
            self._safe = self._safe or is_known_safe(self._store, self._root)

    def _is_folder_lately(self, path: str) -> bool:
        """One that was a folder a moment ago still is: the kernel asks at every step of every path."""
        prefix, now = join(self._root, path), self._runtime.monotonic()
        with self._lock:
            if now - self._folders.get(prefix, float("-inf")) < self._config.refresh_s:
                return True
        if is_folder := self._is_folder(path):
            with self._lock:
                self._folders[prefix] = now
        return is_folder

    def _is_folder(self, path: str) -> bool:
        """Whether keys below `path`, which has no head, make it a folder. A removed one may still hold tombstones: it
        is none unless it was made again or has something to show."""
        prefix = join(self._root, path)
        mark = keys.folder_mark_key(prefix)
        first = next(iter(self._store.list(f"{prefix}/", site="folder", max_keys=1)), None)
        if first is not None and keys.rev_of(prefix, first.key) is not None:  # of a copy that died before its head
            listed = self._store.list(f"{prefix}/", site="folder")
            first = next((each for each in listed if keys.rev_of(prefix, each.key) is None), None)
        if first is None or first.key == mark:
            return first is not None
        parent, _, name = prefix.rpartition("/")
        return not self._exists(deleted_mark_key(parent, name)) or self._exists(mark) or bool(self.listing(path))

    def _exists(self, key: str) -> bool:
        with suppress(errors.ObjectNotFound):
            self._store.get(key, site="folder-mark")
            return True
        return False

    def _head(self, prefix: str) -> Version | None:
        """The head, at most as old as the refresh interval; None when there is none."""
        now = self._runtime.monotonic()
        if (shown := self._shown(prefix)) is not None:
            return shown
        with self._lock:
            known = self._heads.get(prefix)
        heads, before = self._head_file(prefix), known[0] if known else None
        if known is not None and (now - known[1] < self._trusted_s(before) or (before and heads.cut_off_s is not None)):
            seen = [version for version in (before, heads.latest) if version is not None]
            return max(seen, key=lambda version: version.head.rev, default=None)
        try:
            version = heads.read(before) if before is None or before.snapshot else heads.read_if_changed(before)
        except (errors.AccessDenied, errors.StoreUnavailable):
            if before is None or self._config.refresh_s == 0:
                raise
            heads.cut_off_s, version = self._runtime.monotonic(), before
        self._remember(prefix, version, now)
        return version

    def _trusted_s(self, found: Version | Listed | None) -> float:
        """How long it counts. That a name is free only half as long: the kernel remembers that for the other half."""
        is_free = found is None or (isinstance(found, Version) and found.head.deleted)
        return self._config.refresh_s / 2 if is_free else self._config.refresh_s

    def _object(self, prefix: str, look: bool = True) -> Listed | None:
        """The plain object with this key, at most as old as the refresh interval; unless `look`, if that is known."""
        now = self._runtime.monotonic()
        with self._lock:
            known, looked_s = self._objects.get(prefix, (None, float("-inf")))
        if now - looked_s < self._trusted_s(known):
            return known
        if not look:
            return None
        known = objectfile.find(self._source(prefix), known)
        with self._lock:
            self._objects[prefix] = known, now
        return known

    def _shown(self, prefix: str) -> Version | None:
        """The state that is shown of a database that is in use here."""
        return None

    def _is_used_below(self, prefix: str) -> bool:
        """Whether a database below this prefix is."""
        return False

    def _source(self, prefix: str) -> Source:
        return Source(self._store, self._cache, self._runtime, prefix)

    def _head_file(self, prefix: str) -> AnyHead:
        """One per prefix, so that what one connection sees or writes is known to the others at once."""
        made = AnyHead(self._source(prefix), self._config)
        with self._lock:
            return self._head_files.setdefault(prefix, made)

    def _remember(self, prefix: str, version: Version | None, now: float) -> None:
        with self._lock:
            known = self._heads.get(prefix, (None,))[0]
            if version is None or known is None or version.head.rev >= known.head.rev:
                self._heads[prefix] = (version, now)
            if version is not None:
                self._objects.pop(prefix, None)

    def _label(self, path: str) -> str:
        return f"{self._store.name}/{join(self._root, path)}"


def _entry(prefix: str, version: Version) -> Entry:
    return Entry(prefix, False, version.head.size, version.head.time_ms / 1000)


def _plain(found: Listed) -> Entry:
    return Entry(found.key, False, found.size_bytes, found.modified_s, is_fixed=True)


def undotted(path: str) -> str | None:
    """The other name under which `x.sqlite` may be stored: `x`, if that has no dot."""
    stem = path.removesuffix(SHOWN_SUFFIX)
    return stem if stem != path and "." not in stem.rpartition("/")[2] and stem.rpartition("/")[2] else None
