"""Does the store honour If-Match and If-None-Match on PUT? Asked before the first write, never by readers.

The answer is remembered under the mounted prefix (`.s3blockfs/store`), and that very object is what is probed:

1. PUT If-None-Match: *   creates it, "probing"      412: somebody else's probe; go on with his object
2. the same again         must be 412                200: the store ignores If-None-Match
3. PUT If-Match: wrong    must be 412                200: the store ignores If-Match
4. PUT If-Match: right    must apply, "safe"         412: another prober finished first, or nothing ever matches

Only "safe" is remembered, and it always follows two refusals; an unsafe store is asked again, so that an upgrade shows.
Every step starts from what a GET found: an unknown outcome, a dead prober and racing probers are all "start over"."""

import json
from contextlib import suppress
from typing import Any

from s3blockfs import errors
from s3blockfs.format.keys import HIDDEN_FOLDER, join
from s3blockfs.objectstore import ObjectStore
from s3blockfs.runtime import Runtime

ATTEMPTS = 6  # to start over; the waits in between grow from 0.1 s to 1.6 s
SAFE, PROBING = "safe", "probing"

WHAT_TO_DO = (
    "two writers would destroy each other's commits, so nothing is written: use AWS S3, MinIO, R2, Ceph or "
    "SeaweedFS >= 4.16, or say --only-writer if nobody else ever writes there"
)


def probe(store: ObjectStore, prefix: str, runtime: Runtime) -> str | None:
    """Ask the store now, with a temporary key. None: safe; else what is wrong. Raises StoreUnavailable among others."""
    key = join(prefix, HIDDEN_FOLDER, f"doctor-{runtime.token(8).hex()}")
    try:
        return _settle(store, key, runtime)
    finally:
        store.delete([key], site="probe.cleanup")


def is_known_safe(store: ObjectStore, prefix: str) -> bool:
    """Whether an earlier probe found that. One GET; also when it fails, `ensure_safe` can tell."""
    with suppress(errors.StoreError):
        return _says_safe(store.get(join(prefix, HIDDEN_FOLDER, "store"), site="probe.get").body)
    return False


def ensure_safe(store: ObjectStore, prefix: str, runtime: Runtime) -> None:
    """Return when writing under `prefix` is safe: one GET when that is known already, else the probe.
    Raises ReadOnly, StoreUnavailable (no definite answer), what GET and PUT raise (credentials may be read-only)."""
    if (wrong := _settle(store, join(prefix, HIDDEN_FOLDER, "store"), runtime)) is not None:
        raise errors.ReadOnly(f"{store.name}: {wrong}; {WHAT_TO_DO}")


def _settle(store: ObjectStore, key: str, runtime: Runtime) -> str | None:
    for attempt in range(ATTEMPTS):
        if attempt:
            runtime.sleep(0.1 * 2 ** (attempt - 1) * runtime.uniform(0.5, 1.5))
        try:
            return _steps(store, key, runtime)
        except (errors.RequestInDoubt, errors.PreconditionFailed, errors.ObjectNotFound) as error:
            last = error  # the latter two: others were faster
    text = f"cannot find out whether the store honours If-Match ({last}); try again"
    raise errors.StoreUnavailable(f"{store.name}/{key}: {text}") from last


def _steps(store: ObjectStore, key: str, runtime: Runtime) -> str | None:
    def put(site: str, state: str, **condition: Any) -> str:
        # The nonce: ETags are content hashes, and two probers must not write equal objects.
        fields = {"s3blockfs": 1, "state": state, "nonce": runtime.token(8).hex()}
        return store.put(key, json.dumps(fields).encode() + b"\n", site=site, **condition)

    try:
        found = store.get(key, site="probe.get")
    except errors.ObjectNotFound:
        etag = put("probe.create", PROBING, if_absent=True)
    else:
        if _says_safe(found.body):  # anything else, rubbish included, is probed and so replaced
            return None
        etag = found.etag
    with suppress(errors.PreconditionFailed):
        put("probe.again", PROBING, if_absent=True)
        return "this store ignores If-None-Match"
    with suppress(errors.PreconditionFailed):
        put("probe.wrong", PROBING, if_match=f'"{runtime.token(16).hex()}"')
        return "this store ignores If-Match"
    try:
        put("probe.right", SAFE, if_match=etag)
    except errors.PreconditionFailed:
        if store.get(key, site="probe.get").etag == etag:
            return "this store refuses If-Match also with the right ETag"
        raise
    return None


def _says_safe(body: bytes) -> bool:
    return f'"state": "{SAFE}"'.encode() in body
