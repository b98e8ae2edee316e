"""Figures for Prometheus, counted where things happen. Threads: any."""

from collections.abc import Callable
from typing import TypeVar

from prometheus_client import Counter, start_http_server

from s3blockfs.errors import UsageError

T = TypeVar("T")

REQUESTS = Counter("s3blockfs_requests", "Requests to S3 by purpose and outcome", ("site", "outcome"))
RECEIVED = Counter("s3blockfs_received_bytes", "Bytes of objects received from S3")
SENT = Counter("s3blockfs_sent_bytes", "Bytes of objects sent to S3")
CACHE_HITS = Counter("s3blockfs_cache_hits", "Pieces of databases that were in memory when they were needed")
CACHE_MISSES = Counter("s3blockfs_cache_misses", "Pieces of databases that were not")
COMMITS = Counter("s3blockfs_commits", "Transactions published")
FAILED_COMMITS = Counter("s3blockfs_failed_commits", "Transactions not published, or in doubt when COMMIT failed")


def request(site: str, send: Callable[[], T]) -> T:
    """What `send` returns. The outcome is `ok`, the status of S3's answer or the kind of failure."""
    outcome = "ok"
    try:
        result = send()
        RECEIVED.inc(sum(map(len, getattr(result, "pieces", ()))))
        return result
    except Exception as error:
        answer = getattr(error, "response", None) or {}
        outcome = str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", type(error).__name__))
        raise
    finally:
        REQUESTS.labels(site, outcome).inc()


def serve(address: str) -> None:
    """Answer Prometheus at HOST:PORT as long as this process lives. Raises UsageError."""
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host.strip("[]"))
    except OSError as error:
        raise UsageError(f"--metrics {address}: {error.strerror}; choose another port") from error
