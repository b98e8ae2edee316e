"""docs/API.md has every public name, option and error of the package, with its defaults and codes, and no other."""

from __future__ import annotations

import errno
import inspect
import re
from dataclasses import fields
from pathlib import Path

import apsw

import s3blockfs
import s3blockfs.vfs
from s3blockfs import errors
from s3blockfs.config import Config

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "API.md").read_text()


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str, columns: int) -> list[list[str]]:
    """Rows that start with code, without backticks."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.replace("`", "") for cell in row] for row in rows if len(row) >= columns]


def signatures() -> dict[str, str]:
    """By dotted name; empty for what takes no arguments."""
    found = re.findall(r"^### `(s3blockfs[\w.]*)(\(.*\))?`$", DOCUMENT, re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


def test_every_public_name_is_there_with_its_arguments() -> None:
    again = re.findall(r"import \w+ as (\w+)$", inspect.getsource(s3blockfs), re.MULTILINE)  # for type checkers
    public = {f"s3blockfs.{name}" for name in (*again, "__version__")}
    public |= {
        f"s3blockfs.vfs.{name}"
        for name, value in vars(s3blockfs.vfs).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == "s3blockfs.vfs"
    } - {"s3blockfs.vfs.integrity", "s3blockfs.vfs.engine"}  # of `check` and `open`: about a Catalog, not public
    assert set(signatures()) == public - {"s3blockfs.vfs.T"}
    assert s3blockfs.connect is s3blockfs.vfs.connect
    for name, arguments in signatures().items():
        thing = eval(name)
        if arguments:
            parameters = inspect.signature(thing).parameters.values()
            bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
            assert arguments == str(inspect.Signature(bare))


def test_every_argument_of_connect_is_explained() -> None:
    named = [row[0] for row in table(DOCUMENT.partition("### `s3blockfs.connect(")[2].partition("\n### ")[0], 2)]
    assert named == list(inspect.signature(s3blockfs.connect).parameters)


def test_every_method_of_the_vfs_that_applications_call_is_there() -> None:
    rows = table(DOCUMENT.partition("### `s3blockfs.vfs.S3VFS(")[2].partition("\n### ")[0], 2)
    named = {row[0].partition("(")[0]: row[0] for row in rows}
    own = set(vars(s3blockfs.vfs.S3VFS)) | {"name"}
    inner = {"pid", "over", "catalog"}
    assert set(named) == {name for name in own if not name.startswith(("_", "x"))} - inner
    for name, shown in named.items():
        if name != "name":
            wanted = list(inspect.signature(getattr(s3blockfs.vfs.S3VFS, name)).parameters)[1:]
            assert shown == f"{name}({', '.join(wanted)})"


def test_every_option_is_there_with_its_default() -> None:
    named = {row[0]: row[1] for row in table(section("Options"), 3)}
    ours = {each.name: str(each.default) for each in fields(Config) if not each.metadata["mount"]}
    assert named == {name: default for name, default in ours.items() if name != "block_size"}
    mounts = DOCUMENT.partition("For `mount` only")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", mounts)) == {each.name for each in fields(Config) if each.metadata["mount"]}


def test_every_error_is_there_with_its_codes() -> None:
    named = {row[0]: row[1:4] for row in table(section("s3blockfs.errors"), 5)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.S3BlockFSError)]
    assert set(named) == {c.__name__ for c in classes}
    for c in classes:
        base, code, exit_code = named[c.__name__]
        assert (base, getattr(errno, code), int(exit_code)) == (c.__bases__[0].__name__, c.errno, c.exit_code)


def test_what_sqlite_raises() -> None:
    """The table of causes is that of the VFS."""
    rows = {row[0]: row[1] for row in table(section("s3blockfs.errors"), 2) if row[0].startswith("apsw.")}
    assert all(issubclass(getattr(apsw, name[5:]), apsw.Error) for name in rows)
    codes = s3blockfs.vfs._CODES
    opening = {kind.__name__ for kinds in codes["xOpen"] for kind in kinds}
    assert set(re.findall(r"\b[A-Z]\w+", rows["apsw.CantOpenError"])) == opening
    assert {kind.__name__: code.__name__ for kind, code in codes["xLock"].items()} == {
        "Busy": "BusyError",
        "ReadOnly": "ReadOnlyError",
    }
