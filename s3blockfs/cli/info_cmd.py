"""`s3blockfs info BUCKET/NAME`."""

import click

from s3blockfs.cli import options
from s3blockfs.format import extents


@options.command("info", short_help="show what is known of a database")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def run(database: options.Target, as_json: bool) -> None:
    """Show size, last commit, lease, snapshots and the parts of a database. Reads its head alone."""
    with options.opened(database) as (catalog, _, _):
        _, heads, version = catalog.find(database.name)
    head = version.head
    facts = {
        "name": database.name,
        "prefix": heads.prefix,
        "id": head.id.hex(),
        "size_bytes": head.size,
        "block_size": head.block_size,
        "seq": head.seq,
        "rev": head.rev,
        "commit": head.commit.hex(),
        "committed": options.utc(head.time_ms),
        "writer": head.writer,
        "lease": head.lease and head.lease.owner,
        "snapshots": [snapshot.label for snapshot in head.snapshots],
        "floor": head.floor,
        "head_bytes": len(version.body),
        "tail_commits": len(head.tail.commits),
        "tail_bytes": len(head.tail.encoded),
        "segments": len(head.segments),
        "segment_bytes": sum(segment.length for segment in head.segments),
        "map_leaves": len(head.leaves),
        "map_bytes": len(extents.encode(head.extents)),
    }
    options.show(facts, as_json)
