"""`s3blockfs ls BUCKET[/PREFIX]`."""

import argparse
import json
from datetime import datetime, timezone
from functools import partial
from typing import Any

from s3blockfs.cli.options import add_command, config_from, open_store, parse_target
from s3blockfs.errors import DatabaseNotFound
from s3blockfs.runtime import Runtime


def add_parser(subparsers: Any) -> None:
    text = "List the databases and folders under BUCKET/PREFIX, as a mount would show them."
    parser = add_command(subparsers, "ls", run, "list databases and folders", text)
    parser.add_argument("target", metavar="BUCKET[/PREFIX]")
    parser.add_argument("-l", "--long", action="store_true", help="size in bytes and time of the last commit as well")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(namespace: argparse.Namespace) -> int:
    from s3blockfs.catalog import Catalog

    target, config = parse_target(namespace.target), config_from(namespace)
    runtime = Runtime()
    try:
        with open_store(namespace, target, runtime) as store:
            catalog = Catalog(store, runtime, config, target.prefix)
            rows = catalog.listing("")
            if not rows and target.prefix and Catalog(store, runtime, config, "").lookup(target.prefix) is None:
                raise DatabaseNotFound(f"{target}: nothing there; `s3blockfs ls {target.bucket}` shows what is")
            if namespace.long or namespace.json:
                looked_up = [runtime.submit(partial(catalog.lookup, name)) for name, _ in rows]
                rows = [(name, future.result() or row) for (name, row), future in zip(rows, looked_up, strict=True)]
            catalog.close()
    finally:
        runtime.close()
    for name, entry in rows:
        kind = "folder" if entry.is_folder else "database"
        if namespace.json:
            fields = {"name": name, "type": kind, "size_bytes": entry.size, "modified_s": entry.modified_s}
            print(json.dumps(fields))
        elif namespace.long:
            time = datetime.fromtimestamp(entry.modified_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            print(f"{'-' if entry.is_folder else entry.size:>14}  {'' if entry.is_folder else time:19}  {name}")
        else:
            print(name + "/" if entry.is_folder else name)
    return 0
