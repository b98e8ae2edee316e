"""The floors made of boto3 alone: the same bytes by as many requests at once as help, and nothing else."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

THREADS = 16
PIECE_BYTES = 8 << 20
"""Of the sizes from 1 to 16 MiB the one that is fastest here; parts of an upload have to have 5 MiB."""


class Raw:
    """A client without connections yet, and without checksums of its own."""

    def __init__(self, url: str, bucket: str) -> None:
        config = Config(
            max_pool_connections=THREADS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self.client = boto3.client("s3", endpoint_url=url, config=config)
        self.bucket = bucket
        self.pool = ThreadPoolExecutor(THREADS)

    def close(self) -> None:
        self.pool.shutdown()
        self.client.close()

    def _piece(self, key: str, first: int, size: int) -> bytes:
        wanted = f"bytes={first}-{first + size - 1}"
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=key, Range=wanted)["Body"].read()
        return body

    def _size(self, key: str) -> int:
        return int(self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    def read(self, key: str, size: int) -> int:
        """So many bytes of an object, in parallel; how many came."""
        firsts = range(0, size, PIECE_BYTES)
        return sum(map(len, self.pool.map(lambda at: self._piece(key, at, min(PIECE_BYTES, size - at)), firsts)))

    def one(self, key: str, size: int) -> int:
        """So many bytes by one GET."""
        return len(self._piece(key, 0, size))

    def pieces(self, key: str, size: int, of: int, count: int) -> int:
        """Small ranges all over an object, in parallel, as if somebody had known which."""
        firsts = range(0, of - size, max((of - size) // count, 1))
        return sum(map(len, self.pool.map(lambda at: self._piece(key, at, size), firsts)))

    def download(self, key: str, path: str) -> int:
        size = self._size(key)
        with Path(path).open("wb") as file:
            number = file.fileno()
            os.posix_fallocate(number, 0, size)

            def fetch(at: int) -> int:
                return os.pwrite(number, self._piece(key, at, min(PIECE_BYTES, size - at)), at)

            return sum(self.pool.map(fetch, range(0, size, PIECE_BYTES)))

    def upload(self, key: str, path: str) -> int:
        size = Path(path).stat().st_size
        where: dict[str, Any] = {"Bucket": self.bucket, "Key": key}
        with Path(path).open("rb") as file:
            if size <= PIECE_BYTES:
                self.client.put_object(**where, Body=file.read())
                return size
            number = file.fileno()
            upload = where | {"UploadId": self.client.create_multipart_upload(**where)["UploadId"]}

            def send(part: int) -> dict[str, Any]:
                body = os.pread(number, PIECE_BYTES, (part - 1) * PIECE_BYTES)
                return {
                    "PartNumber": part,
                    "ETag": self.client.upload_part(**upload, PartNumber=part, Body=body)["ETag"],
                }

            parts = list(self.pool.map(send, range(1, -(-size // PIECE_BYTES) + 1)))
        self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        return size

    def puts(self, key: str, size: int, count: int) -> int:
        """One after the other."""
        for _ in range(count):
            self.client.put_object(Bucket=self.bucket, Key=key, Body=bytes(size))
        return count * size


def main() -> None:
    """`raw.py upload|download URL BUCKET KEY FILE`: what `s3blockfs import` and `export` are measured by."""
    what, url, bucket, key, path = sys.argv[1:]
    getattr(Raw(url, bucket), what)(key, path)


if __name__ == "__main__":
    main()
