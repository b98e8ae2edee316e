"""Damage: whatever happens to an object, what needs it ends in an error that names it, and all else reads right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest
from damage import CHANGES, LABEL, OTHER, PREFIX, Scene, bodies, extended, kind_of, truncated
from engine import CONFIG, InlineRuntime, World, shrink_limits, small_leaves

from s3blockfs.errors import DamagedObject, NewerFormat, S3BlockFSError
from s3blockfs.fold import fold
from s3blockfs.format import head as head_codec
from s3blockfs.format.data import decode_object
from s3blockfs.format.keys import head_key
from s3blockfs.gc import collect
from s3blockfs.history import archived, open_at
from s3blockfs.snapshot import Snapshot, Source
from s3blockfs.transfer import Place, put_state

HEAD = head_key(PREFIX)


@pytest.fixture(scope="module")
def stocked() -> Iterator[Scene]:
    """Sizes are small, so that there is an object of every kind and not much in it."""
    with pytest.MonkeyPatch.context() as patch, World(InlineRuntime()) as world:
        shrink_limits(patch)
        small_leaves(patch)
        yield Scene(world)


@pytest.fixture
def scene(stocked: Scene) -> Iterator[Scene]:
    stocked.restore()
    stocked.world.store.calls.clear()
    yield stocked
    stocked.restore()


def flipped(body: bytes) -> bytes:
    at = len(body) // 3
    return body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :]


def test_the_scene_has_everything(scene: Scene) -> None:
    head = scene.story.version().head
    assert head.tail.commits and head.segments and head.leaves and head.snapshots and head.floor > 1
    assert {kind_of(key) for key in scene.whole} == {"head", "data", "map", "archive"}
    assert scene.judge() == 0
    assert scene.found() == []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.long, id="all"), pytest.param(0.1, id="sample")])
def test_one_object(scene: Scene, change: str, share: float) -> None:
    """Of each kind, in every way. (The head is the one object that may be another one by right: see below.)"""
    rng, tried, failed = Random(f"{change} {share}"), 0, 0
    everything = list(scene.looked_at)
    for key in scene.whole:
        if change == "replaced" and key == HEAD:
            continue
        cases = list(CHANGES[change](scene, key))
        for body in rng.sample(cases, max(1, int(len(cases) * share))):
            scene.looked_at = everything if share == 1 else [*rng.sample(everything, 3), LABEL]
            scene.put({key: body})
            failed += scene.judge(key) > 0
            tried += 1
            if key != HEAD:
                assert any(key in line for line in scene.found()), f"check does not name {key}"
            scene.put({key: scene.whole[key]})
    scene.looked_at = everything
    print(f"{change}: {tried} cases, in {failed} of them something could not be read")
    assert failed


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 61])
def test_every_byte(scene: Scene, step: int) -> None:
    """One bit of it is flipped, in an object of each kind, in each byte: what reads that object says so, or the byte is
    none that it looked at. All that the engine reads comes by way of these five."""
    source, story = scene.story.new_source(), scene.story
    version = story.version()
    keys = sorted(scene.whole, key=lambda key: len(scene.whole[key]))
    leaf = next(leaf for leaf in version.head.leaves)
    segment = version.head.segments[-1]
    blocks = next(extent for extent in Snapshot.load(source, version).map.find(0, 1 << 40))
    readers = {
        HEAD: lambda _: story.version().head,
        next(key for key in keys if kind_of(key) == "archive"): lambda key: archived(source, key).head,
        leaf.key(PREFIX): lambda _: source.load_leaf(leaf),
        segment.ref.key(PREFIX): lambda _: _frames(scene, segment.ref.key(PREFIX)),
        blocks.ref.key(PREFIX): lambda _: _frames(scene, blocks.ref.key(PREFIX)),
    }
    assert {kind_of(key) for key in readers} == {"head", "archive", "map", "data"}
    for key, read in readers.items():
        body, rng, right = scene.whole[key], Random(key), read(key)
        for at in range(rng.randrange(step), len(body), step):
            scene.put({key: body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + 1 :]})
            try:
                assert read(key) == right, f"byte {at} of {key}"
                assert kind_of(key) == "data", f"byte {at} of {key} does not matter"
                with pytest.raises((DamagedObject, NewerFormat)):  # a byte of the footer: `check` looks at it
                    decode_object(bodies(scene.world, PREFIX)[key], _ref(scene, key), key)
            except (DamagedObject, NewerFormat) as error:
                assert key in str(error)
        scene.put({key: body})


def _ref(scene: Scene, key: str) -> object:
    snapshot = Snapshot.load(scene.story.new_source(), scene.story.version())
    refs = [extent.ref for extent in snapshot.map.find(0, 1 << 40)] + [s.ref for s in snapshot.head.segments]
    return next(ref for ref in refs if ref.key(PREFIX) == key)


def _frames(scene: Scene, key: str) -> list[bytes]:
    """What a process that knows nothing reads of an object, each block or extent by itself."""
    source, version = scene.story.new_source(), scene.story.version()
    snapshot = Snapshot.load(source, version)
    found, damage = [], None
    for start in range(0, snapshot.head.size, snapshot.head.block_size):
        try:
            found.append(snapshot.read(start, snapshot.head.block_size))
        except (DamagedObject, NewerFormat) as error:
            assert key in str(error) and "database bytes" in str(error)
            damage = error
    if damage is not None:
        raise damage
    return found


def test_check_lists_all_at_once(scene: Scene) -> None:
    """Everything but the head, in four ways; and which pages of the newest state that costs."""
    keys = [key for key in scene.whole if key != HEAD]
    ways: list[Callable[[bytes], bytes | None]] = [
        lambda body: body[:-9],
        flipped,
        lambda _: None,
        lambda body: body * 2,
    ]
    for n, key in enumerate(keys):  # not deleted: who names an archive that is gone is an archive, damaged as well
        way = ways[n % 2] if kind_of(key) == "archive" else ways[n % 4]
        scene.put({key: way(scene.whole[key])})
    said = "\n".join(scene.found())
    # Without the archives nobody knows of the objects that only they needed.
    known = {key for key in keys if kind_of(key) == "archive"}
    refs = scene.story.version().head
    known |= {each.key(PREFIX) for each in (*refs.leaves, *(segment.ref for segment in refs.segments))}
    assert not [key for key in known if key not in said], said
    assert "nothing can be read" in said or "bytes" in said
    scene.put({key: scene.whole[key] for key in keys if kind_of(key) in ("map", "archive")})
    said = "\n".join(scene.found())
    assert not [key for key in keys if kind_of(key) == "data" and key not in said], said


def test_check_names_bytes(scene: Scene) -> None:
    snapshot = Snapshot.load(scene.story.new_source(), scene.story.version())
    extent = next(snapshot.map.find(0, 1 << 40))
    scene.put({extent.ref.key(PREFIX): None})
    lines = [line for line in scene.found() if "bytes" in line]
    assert lines and all(extent.ref.key(PREFIX) in line and "missing" in line for line in lines), lines


@pytest.mark.parametrize("which", ["an older one", "another database's", "another database's with a high rev"])
def test_a_head_put_in_place_of_the_newest(scene: Scene, which: str) -> None:
    """It cannot be told from what an operator does on purpose, so it is read; but nothing is deleted by it, and check
    says what was made by later heads, or is missing."""
    body = scene.generations[-9][HEAD] if which == "an older one" else scene.foreign[-1][head_key(OTHER)]
    if which.endswith("rev"):
        head = head_codec.decode(scene.foreign[0][head_key(OTHER)], "it")
        assert head.extents
        body = head_codec.encode(replace(head, rev=1 << 40, floor=(1 << 40) - 1))
    scene.put({HEAD: body})
    assert any("older" in line or "missing" in line for line in scene.found())
    before = bodies(scene.world, PREFIX)
    for retain_s in (1e6, 500.0, 0.0):
        with pytest.raises(DamagedObject, match=r"older|missing"):
            collect(scene.story.new_source(), scene.story.heads(), retain_s)
    assert bodies(scene.world, PREFIX) == before
    scene.restore()
    assert scene.judge() == 0


@pytest.mark.parametrize("way", ["deleted", "flipped"])
@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.long, id="all"), pytest.param(0.3, id="sample")])
def test_writers_over_damage(scene: Scene, way: str, share: float) -> None:
    """A commit, a fold, a collection, a copy and a restore while an object is damaged: each works or names it. Damage
    stays damage, and when the object is put back, all is right: nothing that could help was deleted."""
    rng, done = Random(f"{way} {share}"), {True: 0, False: 0}
    keys = [key for key in scene.whole if key != HEAD]
    for key in rng.sample(keys, int(len(keys) * share)):
        expected = bytearray(scene.story.states[scene.kept[0]])
        scene.put({key: None if way == "deleted" else flipped(scene.whole[key])})
        for act in (_commit, _fold, _collect, _copy, _restore):
            try:
                act(scene, expected, key)
                done[True] += 1
            except S3BlockFSError as error:
                assert key in str(error), f"{act.__name__}: {error!r}"
                done[False] += 1
            _assert_right_or_named(scene.story.new_source(), scene, expected, key)
        scene.put({key: scene.whole[key]})
        newest = Snapshot.load(scene.story.new_source(), scene.story.version())
        assert newest.read(0, 1 << 40) == expected, f"{key} was put back, and something is gone"
        assert open_at(scene.story.new_source(), scene.story.heads(), LABEL).read(0, 1 << 40) == scene.expected[LABEL]
        scene.restore()
    assert done[True] and done[False], done


def _assert_right_or_named(source: Source, scene: Scene, expected: bytes, key: str) -> None:
    try:
        version = scene.world.heads(source.prefix).read()
        assert version is not None
        assert Snapshot.load(source, version).read(0, 1 << 40) == expected, f"wrong bytes with {key} damaged"
    except (DamagedObject, NewerFormat) as error:
        assert key in str(error)


def _commit(scene: Scene, expected: bytearray, key: str) -> None:
    database = scene.world.machine(block_size=1024).open(PREFIX)
    at, data = 7000, b"x" * 3000
    database.write(at, data)
    database.close_handle(0)
    expected[at : at + len(data)] = data


def _fold(scene: Scene, expected: bytearray, key: str) -> None:
    fold(scene.story.new_source(), scene.story.heads(), CONFIG, scene.story.version())


def _collect(scene: Scene, expected: bytearray, key: str) -> None:
    scene.world.runtime.sleep(10)
    before = bodies(scene.world, PREFIX)
    try:
        collect(scene.story.new_source(), scene.story.heads(), 5)
    except DamagedObject:
        assert bodies(scene.world, PREFIX) == before
        raise


def _copy(scene: Scene, expected: bytearray, key: str) -> None:
    """What is copied may be damaged as well; then it is so under its new name."""
    source = scene.story.new_source()
    target = Source(source.store, source.cache, source.runtime, "c.db")
    heads = scene.world.heads("c.db")
    try:
        state = Snapshot.load(source, scene.story.version())
        put_state(state, source, Place(target, heads, heads.read(), None), "me")
        copy = Snapshot.load(target, heads.read())  # type: ignore[arg-type]
        try:
            assert copy.read(0, 1 << 40) == expected, "a copy with wrong bytes"
        except DamagedObject as error:
            assert "c.db/data/" in str(error)
    finally:
        scene.put(dict.fromkeys(bodies(scene.world, "c.db")))


def _restore(scene: Scene, expected: bytearray, key: str) -> None:
    source, heads = scene.story.new_source(), scene.story.heads()
    state = open_at(source, heads, LABEL)
    put_state(state, source, Place(source, heads, scene.story.version(), None), "me")
    expected[:] = scene.expected[LABEL]


def test_a_store_of_sqlite_s3vfs(scene: Scene) -> None:
    """That layout has no checksums, so a changed byte is not seen; a missing, short or long block is."""
    from s3vfs import CREATE, MemoryBucket, adopt, fill, run

    world, prefix = World(), "old.sqlite"
    with world:
        run(MemoryBucket(world.store.inner), prefix, CREATE, fill(200), block_size=4096)
        whole = bodies(world, prefix)
        right = world.content(prefix)
        fake = type("Whole", (), {"whole": whole})
        for key in whole:
            for body in (None, *truncated(fake, key), *extended(fake, key)):  # type: ignore[arg-type]
                if body is None:
                    world.store.inner.delete([key])
                else:
                    world.store.inner.put(key, body)
                try:
                    assert world.content(prefix) == right, f"{key}: {len(body or b'')} bytes"
                except S3BlockFSError as error:
                    assert prefix in str(error)
                world.store.inner.put(key, whole[key])
        adopt(world, prefix)
