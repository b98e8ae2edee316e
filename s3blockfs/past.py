"""`.snapshots`, a folder in a mount's root that no listing shows: every commit that can be opened as a file of its own.

`.snapshots/a/b.db/12.sqlite` is what `a/b.db` held right after commit 12, and never changes; a named snapshot is a link
to one of these. Thread rule: any thread; `_lock` is never held during a request to the store."""

import threading
from collections.abc import Sequence

from cachetools import LRUCache

from s3blockfs.catalog import Catalog
from s3blockfs.database import Database
from s3blockfs.errors import DatabaseNotFound, Immutable
from s3blockfs.format.head import LABEL
from s3blockfs.history import archived, commits
from s3blockfs.names import SHOWN_SUFFIX, Entry
from s3blockfs.snapshot import Version

FOLDER = ".snapshots"
LISTED = 1000  # files that a database's folder shows at most, the newest ones; others are found by their names

#: Past states kept open, and databases whose commits are remembered: reading those takes a GET for each kept head.
OPENED_KEPT = 8
HISTORIES_KEPT = 16


class MountedNames:
    """The names of a mount: what its catalog has, and the past. Paths as the kernel says them, with a slash first."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._opened: LRUCache[str, Database] = LRUCache(OPENED_KEPT)
        self._histories: LRUCache[str, tuple[Version, dict[str, Entry]]] = LRUCache(HISTORIES_KEPT)

    def lookup(self, path: str) -> Entry | None:
        """What it is, or None. Raises what reading heads raises."""
        if (below := _below(path)) is None:
            return self._catalog.lookup(path[1:])
        folder, _, name = below.rpartition("/")
        if name.endswith(SHOWN_SUFFIX) and (states := self._states(folder, name)) is not None:
            return states.get(name)
        entry = self._catalog.lookup(below)
        return entry and _folder(entry)

    def listing(self, path: str) -> Sequence[tuple[str, Entry]]:
        """(name, entry) of everything in a folder. Raises what reading heads raises."""
        if (below := _below(path)) is None:
            return [each for each in self._catalog.listing(path[1:]) if path != "/" or each[0] != FOLDER]
        if (states := self._states(below)) is not None:
            return list(states.items())[:LISTED]
        return [(name, _folder(entry)) for name, entry in self._catalog.listing(below)]

    def open(self, path: str) -> Database:
        """Of the past, one that the catalog does not know. Raises DatabaseNotFound, and what reading raises."""
        if _below(path) is None:
            return self._catalog.open(path[1:])
        if (entry := self.lookup(path)) is None or entry.is_folder:
            raise DatabaseNotFound(f"{path}: no such commit")
        with self._lock:
            opened = self._opened.get(path)
        if opened is None:
            at = path.rpartition("/")[2].removesuffix(SHOWN_SUFFIX)
            made = self._catalog.past(entry.prefix, path[1:], at)
            with self._lock:
                opened = self._opened.setdefault(path, made)
        return opened

    def changeable(self, path: str) -> str:
        """The same for the catalog. Raises Immutable for the past."""
        if _below(path) is not None:
            raise Immutable(f"{path}: the past cannot be changed")
        return path[1:]

    def _states(self, path: str, wanted: str = "") -> dict[str, Entry] | None:
        """The files in the folder of a database, links first, then the newest; None when it is no database. A commit
        that is `wanted` and known stays what it was, so the store is not asked whether there are newer ones."""
        if (entry := self._catalog.lookup(path)) is None or entry.is_folder:
            return None
        with self._lock:
            known, states = self._histories.get(entry.prefix, (None, {}))
        if wanted in states and states[wanted].shown_as is None:
            return states
        source, heads = self._catalog.at(entry.prefix)
        version = heads.read() if known is None else heads.read_if_changed(known)
        if version is None or version.snapshot is not None:
            return {}  # sqlite-s3vfs keeps no past
        if version is not known:
            states = {}
            for label, key in version.head.snapshots:
                if LABEL.fullmatch(label):
                    target = f"{archived(source, key).head.seq}{SHOWN_SUFFIX}"
                    states[label + SHOWN_SUFFIX] = Entry(entry.prefix, False, shown_as=target)
            for seq, _, time_ms, size, _ in commits(source, heads):
                states[f"{seq}{SHOWN_SUFFIX}"] = Entry(entry.prefix, False, size, time_ms / 1000, is_fixed=True)
            with self._lock:
                self._histories[entry.prefix] = version, states
        return states


def _below(path: str) -> str | None:
    """The path below `.snapshots`; None for the present."""
    first, _, rest = path[1:].partition("/")
    return rest if first == FOLDER else None


def _folder(entry: Entry) -> Entry:
    return Entry(entry.prefix, is_folder=True, is_fixed=True)
