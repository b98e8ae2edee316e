"""What databases there are, and what can be done with their names: `s3blockfs ls|info|lease|cp|mv|rm`."""

import os
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import click

from s3blockfs.cli import options
from s3blockfs.errors import UNUSABLE, DatabaseNotFound, UsageError
from s3blockfs.format import extents
from s3blockfs.format.keys import join


@options.command("ls", short_help="list databases and folders")
@click.argument("target", type=options.target, metavar="BUCKET[/PREFIX]")
@click.option("-l", "--long", is_flag=True, help="size in bytes and time of the last commit as well")
@options.json_option
def ls(target: options.Target, long: bool, as_json: bool) -> int:
    """List the databases, SQLite files and folders under BUCKET/PREFIX, as a mount would show them."""
    with options.opened(options.Target(target.bucket, "")) as (catalog, _, runtime):
        rows = catalog.listing(target.prefix)
        if not rows and catalog.lookup(target.prefix) is None:
            raise DatabaseNotFound(f"{target}: nothing there; `s3blockfs ls {target.bucket}` shows what is")
        code, asked = 0, rows if long or as_json else []
        looks = [runtime.submit(partial(catalog.detailed, join(target.prefix, name), each)) for name, each in asked]
        for (name, entry), look in zip_longest(rows, looks):
            try:
                entry = (look and look.result()) or entry
            except UNUSABLE as error:  # no reason to hide the others
                options.complain(error)
                code = error.exit_code
            kind, text = "object" if entry.is_fixed else "database", name
            if entry.is_folder:
                kind, text = "folder", f"{name}/"
            if long:
                time = options.utc(int(entry.modified_s * 1000))[:19].replace("T", " ")
                text = f"{'-':>14}  {'':19}  {name}" if entry.is_folder else f"{entry.size:>14}  {time}  {name}"
            facts = {"name": name, "type": kind, "size_bytes": entry.size, "modified_s": entry.modified_s}
            options.show(facts, as_json, text)
    return code


@options.command("info", short_help="show what is known of a database")
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def info(database: options.Target, as_json: bool) -> None:
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
        "tail_commits": len(head.tail.records),
        "tail_bytes": head.tail.encoded_bytes,
        "segments": len(head.segments),
        "segment_bytes": sum(segment.length for segment in head.segments),
        "map_leaves": len(head.leaves),
        "map_bytes": len(extents.encode(head.extents)),
    }
    options.show(facts, as_json)


@options.command("lease", short_help="show or break the lease of a writer")
@click.argument("action", type=click.Choice(["show", "break"]))
@click.argument("database", type=options.database, metavar="BUCKET/NAME")
@options.json_option
def lease(action: str, database: options.Target, as_json: bool) -> None:
    """Show which machine holds the right to write a database, or end that right.
    Breaking a lease is safe: if its holder is alive after all, the slower of two commits fails."""
    with options.opened(database) as (catalog, _, _):
        _, heads, version = catalog.find(database.name)
        if action == "break" and version.head.lease is not None:
            catalog.require_writable()
            version = heads.swap(version, lambda head: replace(head, lease=None))
    held = version.head.lease
    options.show({"owner": held and held.owner, "seconds": held and held.seconds}, as_json)


def places(old: options.Target, new: options.Target) -> tuple[options.Target, str, str]:
    """The deepest folder that both are in, and their names below it."""
    if old.bucket != new.bucket:
        raise UsageError(f"{old} and {new} are in two buckets; use s3blockfs export {old} - | s3blockfs import - {new}")
    folder = os.path.commonpath([old.prefix, new.prefix])
    name, new_name = (each.key[len(folder) :].lstrip("/") for each in (old, new))
    return options.Target(old.bucket, folder), name, new_name


@options.command("cp", short_help="copy a database")
@click.argument("old", type=options.database, metavar="BUCKET/NAME")
@click.argument("new", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def cp(old: options.Target, new: options.Target, force: bool) -> None:
    """Copy the newest state of a database within a bucket. The bytes do not pass through this machine."""
    folder, name, new_name = places(old, new)
    with options.opened(folder) as (catalog, _, _):
        catalog.copy(name, new_name, overwrite=force)


@options.command("mv", short_help="rename a database")
@click.argument("old", type=options.database, metavar="BUCKET/NAME")
@click.argument("new", type=options.database, metavar="BUCKET/NAME")
@options.force_option
def mv(old: options.Target, new: options.Target, force: bool) -> None:
    """Rename a database, or a folder of them, within a bucket. The bytes do not pass through this machine. A database
    loses its history; one with named snapshots is renamed only with --force, and loses them, too."""
    folder, name, new_name = places(old, new)
    with options.opened(folder) as (catalog, _, _):
        entry = catalog.lookup(name)
        if entry and not entry.is_folder and not force and catalog.find(name)[2].head.snapshots:
            raise UsageError(f"{old}: has snapshots, which would be lost; restore them --as others, or use --force")
        catalog.rename(name, new_name, overwrite=force)


@options.command("rm", short_help="delete databases")
@click.argument("databases", type=options.database, metavar="BUCKET/NAME...", nargs=-1, required=True)
def rm(databases: tuple[options.Target, ...]) -> None:
    """Delete databases, without asking. Stops at the first that cannot be deleted."""
    for database in databases:
        with options.opened(database) as (catalog, _, _):
            catalog.remove(database.name)
