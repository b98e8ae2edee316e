"""Faults put into the engine on purpose: a simulation that cannot find them proves nothing.

Each replaces one place of the source while the module is imported, so it must be installed before the engine is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "s3blockfs"


class Mutant(NamedTuple):
    module: str
    old: str
    new: str
    actors: str = ""
    faults: str = ""
    """Who and what is enough to bring it about, where it is rare: fewer actors meet more often."""


MUTANTS = {
    "no floor check on uploads": Mutant(
        "commit", "if any(ref.rev <= replaced.floor for ref in refs):", "if False:", "client-a,client-b,collect,keep"
    ),
    "no archives": Mutant("head", "(archives or _drops(current.head, head))", "False"),
    "no nonce in the head": Mutant("head", "nonce=self._nonce(), archived=last", "nonce=bytes(8), archived=last"),
    "seq as identity": Mutant(
        "head", "return self._commit_at(mine, seen) == mine.commit", "return self._commit_at(mine, seen) is not None"
    ),
    "a 412 means lost": Mutant(
        "head",
        "except (PreconditionFailed, ObjectNotFound, errors.RequestInDoubt):",
        "except PreconditionFailed:\n                raise errors.CommitLost('412') from None\n"
        "            except (ObjectNotFound, errors.RequestInDoubt):",
    ),
    "given up without a no-op": Mutant(
        "head",
        "self._put(seen, replace(seen.head, rev=seen.head.rev + 1, nonce=self._nonce()))",
        "pass",
        "client-a",
        "late",
    ),
    "map before log": Mutant(
        "snapshot", "if piece.seq > complete_to and piece.end", "if complete_to < 0 and piece.end"
    ),
    "cuts mask nothing": Mutant("snapshot", "if cut.seq > complete_to), high))", "if False), high))"),
    "an older block wins a merge": Mutant(
        "blockmap", "best.append(max(here, key=lambda extent: extent.seq))", "best.append(here[0])"
    ),
    "the play-back of a lost commit is published": Mutant(
        "database", "self._discarding = writers[0][0]", "self._discarding = None"
    ),
    "no counter bump": Mutant(
        "commit",
        "counter = own if base.head.counter is None else (base.head.counter + 1) & 0xFFFFFFFF",
        "counter = own",
    ),
    "close without unlock publishes": Mutant(
        "database", "if self.locks.level(owner) < Level.RESERVED:\n                return False", "return False"
    ),
    "readers move in mid-transaction": Mutant(
        "database",
        "self.locks.level(other) >= Level.SHARED for other in self.locks if",
        "False for other in self.locks if",
    ),
    "delete without a tombstone": Mutant(
        "transfer",
        "return heads.swap(version, make, archives=True)",
        "target.store.delete([f'{target.prefix}/head'], site='mutant')\n        return version",
    ),
    "a folder deletes its failed uploads": Mutant(
        "fold",
        "swapped = heads.swap(version, make)",
        "try:\n            swapped = heads.swap(version, make)\n        except Exception:\n"
        "            source.store.delete([e.ref.key(source.prefix) for e in extents], site='mutant')\n"
        "            raise",
        "client-a,client-b,fold",
        "reply-lost",
    ),
    "folds ask for no database id": Mutant(
        "head", "elif (seen.id, seen.deleted) != (base.head.id, base.head.deleted):", "elif seen.deleted:"
    ),
    "the collector forgets the archives": Mutant("gc", "chain(roots(source, head), [version])", "[version]"),
    "the collector forgets the floor": Mutant("gc", "if rev <= head.floor and entry.key", "if entry.key"),
    "a copy that was replaced counts as lost": Mutant(
        "head",
        "return seen.id == mine.id or (seen.id",
        "return seen.id == mine.id or (False and seen.id",
        "client-a,copy,restore,rename",
        "reply-lost",
    ),
}


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed text; never from or into a cache."""

    def __init__(self, name: str, path: str, mutant: Mutant) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> object:
        return compile(mutated(self._mutant), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"s3blockfs.{self._mutant.module}":
            return None
        file = str(PACKAGE / f"{self._mutant.module}.py")
        return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, file, self._mutant))


def mutated(mutant: Mutant) -> str:
    """The module's text with its fault. Raises ValueError unless there is exactly one such place."""
    text = (PACKAGE / f"{mutant.module}.py").read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.module}.py holds this {text.count(mutant.old)} times: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def install(name: str) -> None:
    """From now on the engine is imported with this fault."""
    if f"s3blockfs.{MUTANTS[name].module}" in sys.modules:
        raise RuntimeError("the engine has been imported already")
    sys.meta_path.insert(0, _Finder(MUTANTS[name]))
