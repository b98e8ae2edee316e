"""A database with every kind of object, what may happen to their bytes, and a judge of what is read afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from engine import World
from story import PREFIX, Story

from s3blockfs.check import findings
from s3blockfs.errors import DatabaseNotFound, S3BlockFSError, TooOld
from s3blockfs.format.keys import head_key
from s3blockfs.history import commits, keep, open_at
from s3blockfs.snapshot import Snapshot

OTHER = "b.db"
BLOCK_BYTES = 1024
LABEL = "monday"

Bodies = dict[str, bytes]


def stock(world: World, seed: object, prefix: str = PREFIX) -> tuple[Story, list[Bodies]]:
    """A story whose past and present need heads with a tail, archives, segments, block objects, leaves, and a named
    snapshot from before the floor; and the objects under its prefix after each step. Wants `shrink_limits` and
    `small_leaves`. The same seed makes objects of the same kinds, not the same ones."""
    story = Story(world, seed, BLOCK_BYTES, prefix=prefix)
    generations: list[Bodies] = []

    def remember() -> None:
        story.database.refresh(0)
        generations.append(bodies(world, prefix))

    def write(*places: tuple[int, int]) -> None:
        for offset, length in places:
            story.write(offset, story.rng.randbytes(length))
        story.commit()
        remember()

    write((0, 40_000))  # block objects
    keep(story.new_source(), story.heads(), story.version(), LABEL)
    for low in range(0, 40_000, 5000):  # segments, each of which is folded: a map with leaves
        write((low, 900), (low + 2000, 900))
        write(*((at, 300) for at in range(low + 100, low + 4500, 1500)))
        write((low + 3000, 400))
        story.fold()
    world.runtime.sleep(1000)
    write((12_000, 10), (50, 300))
    story.fold()
    story.collect(retain_s=500)  # the floor is above what the named snapshot keeps
    write((10_240, 20_480))  # in the place of other blocks
    write((50, 300))
    story.truncate(35_000)
    write((33_000, 5000))
    story.fold()
    write(*((at, 900) for at in range(500, 30_000, 4000)))
    write((5000, 700))
    write((2048, 12_288))
    write((14_000, 100))
    write((4096, 12_288))  # displaces blocks of the one before, whose record is still in the log
    write((60, 300))
    return story, generations


def bodies(world: World, prefix: str) -> Bodies:
    store = world.store.inner
    return {entry.key: store.get(entry.key).body for entry in store.list(f"{prefix}/")}


def kind_of(key: str) -> str:
    """Objects of one kind have one shape of key."""
    return key.split("/")[1]


# --- what may happen to an object ----------------------------------------------------------------------

#: What the bytes of the object under a key become (None: it is deleted), from all that there ever was.
Change = Callable[["Scene", str], Iterator[bytes | None]]


def truncated(scene: Scene, key: str) -> Iterator[bytes]:
    body = scene.whole[key]
    for length in {0, 1, 15, 16, 40, len(body) // 2, len(body) - 48, len(body) - 9, len(body) - 1}:
        yield body[: max(0, length)]


def extended(scene: Scene, key: str) -> Iterator[bytes]:
    yield from (scene.whole[key] + more for more in (b"\0", b"\n", scene.whole[key]))


def overwritten(scene: Scene, key: str) -> Iterator[bytes]:
    """A sector of zeros, and two that changed places."""
    body, at = scene.whole[key], len(scene.whole[key]) // 3
    yield body[:at] + bytes(40) + body[at + 40 :]
    yield body[:at] + body[at + 20 : at + 40] + body[at : at + 20] + body[at + 40 :]


def deleted(scene: Scene, key: str) -> Iterator[None]:
    yield None


def replaced(scene: Scene, key: str) -> Iterator[bytes]:
    """By each other object of its kind: of this database, now or earlier, or of the other one."""
    yield from (body for body in scene.others(kind_of(key)) if body != scene.whole[key])


CHANGES: dict[str, Change] = {
    change.__name__: change for change in (truncated, extended, overwritten, deleted, replaced)
}


# --- what is read afterwards ---------------------------------------------------------------------------


class Scene:
    """The stocked database, another one, and how all that is kept reads while nothing is damaged."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.story, self.generations = stock(world, "ours")
        self.foreign = stock(world, "theirs", OTHER)[1]
        self.whole = bodies(world, PREFIX)
        self.kept = [commit.seq for commit in commits(self.story.new_source(), self.story.heads())]
        self.expected: dict[int | str, bytes] = {seq: self.story.states[seq] for seq in self.kept}
        self.expected[LABEL] = self.story.states[2]
        self.looked_at: list[int | str] = [*self.story.states, LABEL]
        """Which past states are read."""

    def others(self, kind: str) -> set[bytes]:
        """All objects of a kind that there ever were."""
        found = chain.from_iterable(objects.items() for objects in (*self.generations, self.foreign[-1]))
        return {body for key, body in found if kind_of(key) == kind}

    def put(self, changes: dict[str, bytes | None]) -> None:
        store = self.world.store.inner
        for key, body in changes.items():
            if body is None:
                store.delete([key])
            else:
                store.put(key, body)

    def restore(self) -> None:
        self.put(dict.fromkeys(bodies(self.world, PREFIX).keys() - self.whole.keys()))
        self.put({**self.whole})

    def judge(self, *damaged: str) -> int:
        """All that is kept is read by a process that knows nothing: how much of it fails. What fails names one of these
        objects, the rest is right."""
        failed = self._tried(damaged, self._newest)
        failed += self._tried(damaged, self._history)
        for which in self.looked_at:
            failed += self._tried(damaged, lambda which=which: self._past(which))  # type: ignore[misc]
        return failed

    def _tried(self, damaged: tuple[str, ...], look: Callable[[], None]) -> int:
        try:
            look()
        except (S3BlockFSError, OSError) as error:
            assert isinstance(error, S3BlockFSError), error
            named = any(key in str(error) for key in damaged)
            missing = isinstance(error, DatabaseNotFound) and head_key(PREFIX) in damaged
            assert named or missing, f"{error!r} names none of {damaged}"
            return 1
        return 0

    def _newest(self) -> None:
        version = self.story.heads().read()
        if version is None:
            raise DatabaseNotFound("no head")
        content = Snapshot.load(self.story.new_source(), version).read(0, 1 << 40)
        assert content == self.story.states[self.kept[0]], "wrong bytes"

    def _history(self) -> None:
        found = [commit.seq for commit in commits(self.story.new_source(), self.story.heads())]
        assert found == self.kept, "commits that are kept are not listed"

    def _past(self, which: int | str) -> None:
        try:
            content = open_at(self.story.new_source(), self.story.heads(), which).read(0, 1 << 40)
        except TooOld:
            assert which not in self.expected, "what is kept is said to be too old"
            return
        assert content == self.expected.get(which, self.story.states.get(which, b"")), f"wrong bytes in {which}"

    def found(self) -> list[str]:
        """What `check` says."""
        version = self.story.heads().read()
        assert version is not None
        return findings(self.story.new_source(), self.story.heads(), version, lambda done, total: None)
