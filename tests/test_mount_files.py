"""The mount as a file system: what programs that know nothing of databases do, and with which errno it is refused."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Client, Mount, Place, SqlError, mounted, shell, sqlite

pytestmark = pytest.mark.mount

#: A client process: a test never opens a file on a mount itself.
PRELUDE = """
import errno, fcntl, json, os, stat, sys
os.chdir(sys.argv[1])
result = {}
def errno_of(act, *arguments):
    try:
        act(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "OK"
def make(name, content=b"", flags=0):
    fd = os.open(name, os.O_RDWR | os.O_CREAT | flags, 0o666)
    os.write(fd, content)
    return fd
def content(name):
    with open(name, "rb") as file:
        return file.read().decode()
"""


def client(directory: Path, script: str) -> dict[str, object]:
    """Run Python in another process, with the mount as its folder; what it put into `result`."""
    code = PRELUDE + script + "\nprint(json.dumps(result))"
    done = shell(sys.executable, "-c", code, directory)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture
def mounts(place: Place, tmp_path: Path) -> Iterator[tuple[Mount, Mount]]:
    with mounted(place, tmp_path) as mount, mounted(place, tmp_path) as other:
        yield mount, other


def test_folders(mounts: tuple[Mount, Mount], place: Place) -> None:
    """mkdir and rmdir as everywhere, seen by every mount at once; `rm -r` takes a tree with databases."""
    mount, other = mounts
    script = """
os.mkdir("f"), os.mkdir("f/g")
os.close(make("plain"))
for name, act, path in (
    ("mkdir of a folder", os.mkdir, "f"), ("mkdir of a file", os.mkdir, "plain"), ("mkdir in nothing", os.mkdir, "x/y"),
    ("mkdir in a file", os.mkdir, "plain/x"), ("mkdir like a database", os.mkdir, "x.db"),
    ("mkdir like a journal", os.mkdir, "x-journal"), ("mkdir of the hidden one", os.mkdir, "f/.s3blockfs"),
    ("mkdir with a long name", os.mkdir, "x" * 256), ("rmdir of a full one", os.rmdir, "f"),
    ("rmdir of a file", os.rmdir, "plain"), ("rmdir of nothing", os.rmdir, "x"),
    ("rmdir of the root", os.rmdir, sys.argv[1]), ("unlink of a folder", os.unlink, "f"),
    ("rmdir", os.rmdir, "f/g"), ("again", os.mkdir, "f/g"),
):
    result[name] = errno_of(act, path)
result["links"] = [os.stat(name).st_nlink for name in (".", "f", "plain")]
result["open a folder"] = errno_of(os.open, "f", os.O_WRONLY)
"""
    assert client(mount.directory, script) == {
        "mkdir of a folder": "EEXIST",
        "mkdir of a file": "EEXIST",
        "mkdir in nothing": "ENOENT",
        "mkdir in a file": "ENOTDIR",
        "mkdir like a database": "EINVAL",
        "mkdir like a journal": "EINVAL",
        "mkdir of the hidden one": "EINVAL",
        "mkdir with a long name": "ENAMETOOLONG",
        "rmdir of a full one": "ENOTEMPTY",
        "rmdir of a file": "ENOTDIR",
        "rmdir of nothing": "ENOENT",
        "rmdir of the root": "EBUSY",
        "unlink of a folder": "EISDIR",
        "rmdir": "OK",
        "again": "OK",
        "links": [1, 1, 1],
        "open a folder": "EISDIR",
    }
    assert place.listing().count("f/g/.s3blockfs/folder") == 1
    for shown in (mount, other):
        assert shell("find", shown.directory, "-printf", "%y %P\n").stdout.splitlines() == [
            "d ",
            "d f",
            "d f/g",
            "f plain",
        ]
    shell("mkdir", "-p", mount / "a/b/c", check=True)
    sqlite(other / "a/b/c/x.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1)")
    assert sqlite(mount / "a/b/c/x.db", "SELECT a FROM t") == "1"
    shell("rm", mount / "a/b/c/x.db", check=True)
    assert shell("ls", "-A", other / "a/b").stdout == "c\n"
    sqlite(other / "a/b/c/x.db", "CREATE TABLE t(a)")
    assert shell("rm", "-r", mount / "a", mount / "f").stderr == ""
    for shown in (mount, other):
        assert shell("ls", "-A", shown.directory).stdout == "plain\n"
        assert "No such file" in shell("stat", shown / "a").stderr
    shell("mkdir", other / "a", check=True)
    assert shell("ls", "-A", mount / "a").stdout == ""


def test_files(mounts: tuple[Mount, Mount]) -> None:
    """Flags of open(2), sparse files, files that are unlinked while open, what stat and df say."""
    mount, other = mounts
    script = """
fd = make("exclusive", b"1", os.O_EXCL)
result["exclusive"] = errno_of(make, "exclusive", b"2", os.O_EXCL)
os.fsync(fd)
os.close(make("cut", b"long"))
os.close(make("cut", b"x", os.O_TRUNC))
one, two = make("log", b"", os.O_APPEND), make("log", b"", os.O_APPEND)
for number in range(4):
    os.write(one, b"1"), os.write(two, b"22")
os.close(one), os.close(two)
sparse = make("sparse")
os.pwrite(sparse, b"end", 1 << 33)
os.ftruncate(sparse, (1 << 33) + 100)
result["hole"] = os.pread(sparse, 6, (1 << 33) - 2).hex()
os.close(sparse)
filled = make("filled")
os.posix_fallocate(filled, 0, 5000)
os.close(filled)
result["sizes"] = [os.stat(name).st_size for name in ("exclusive", "cut", "log", "sparse", "filled")]
gone = make("gone", b"still there")
os.fsync(gone), os.unlink("gone")
result["unlinked"] = [os.pread(gone, 99, 0).decode(), errno_of(os.write, gone, b"x"), errno_of(os.fstat, gone)]
os.close(gone)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.chmod("cut", 0o777)
os.chown("cut", os.getuid(), -1)
os.utime("cut", (1, 1))
result["mode"] = oct(os.stat("cut").st_mode)
result["mtime kept"] = os.stat("cut").st_mtime > 1e9
df = os.statvfs(".")
result["df"] = [df.f_namemax, df.f_bavail * df.f_frsize >= 1 << 50, df.f_ffree > 1 << 20]
"""
    assert client(mount.directory, script) == {
        "exclusive": "EEXIST",
        "hole": "0000656e6400",
        "sizes": [1, 1, 12, (1 << 33) + 100, 5000],
        "unlinked": ["still there", "ESTALE", "ENOENT"],
        "mode": "0o100600",
        "mtime kept": True,
        "df": [255, True, True],
    }
    script = """
result = {name: content(name) for name in ("exclusive", "cut", "log")}
result["again"] = errno_of(make, "exclusive", b"2", os.O_EXCL)
"""
    assert client(other.directory, script) == {"exclusive": "1", "cut": "x", "log": "122" * 4, "again": "EEXIST"}


def test_mtime_is_the_time_of_the_last_commit(mounts: tuple[Mount, Mount]) -> None:
    mount, other = mounts
    sqlite(mount / "a.db", "CREATE TABLE t(a)")

    def seen() -> set[str]:
        return {shell("stat", "-c", "%.Y", shown / "a.db").stdout for shown in (mount, other)}

    before = seen()
    shell("touch", "-d", "2001-01-01", mount / "a.db", check=True)
    sqlite(mount / "a.db", "SELECT * FROM t")
    assert seen() == before and len(before) == 1
    shell("sleep", "1")  # S3's clock counts seconds
    sqlite(other / "a.db", "INSERT INTO t VALUES (1)")
    assert len(seen()) == 1 and float(*seen()) > float(*before)


def test_what_s3_has_no_place_for_is_refused(mounts: tuple[Mount, Mount]) -> None:
    """EPERM for links and devices, EOPNOTSUPP for extended attributes, EXDEV for renaming; tools know what to do."""
    mount, _ = mounts
    script = """
os.close(make("f.db", b"content"))
os.mkdir("d")
for name, act, *arguments in (
    ("link", os.link, "f.db", "new"), ("symlink", os.symlink, "f.db", "new"), ("fifo", os.mkfifo, "new"),
    ("device", os.mknod, "new", stat.S_IFCHR | 0o600, 259), ("file", os.mknod, "made", stat.S_IFREG | 0o600),
    ("file again", os.mknod, "made", stat.S_IFREG | 0o600), ("journal", os.mknod, "f.db-journal"),
    ("setxattr", os.setxattr, "f.db", "user.x", b"1"), ("getxattr", os.getxattr, "f.db", "user.x"),
    ("listxattr", os.listxattr, "f.db"), ("removexattr", os.removexattr, "f.db", "user.x"),
    ("xattr of a folder", os.setxattr, "d", "user.x", b"1"),
    ("rename a journal", os.rename, "f.db-journal", "g.db-journal"),
    ("rename to a journal", os.rename, "f.db", "g.db-journal"),
    ("chown", os.chown, "f.db", 4711, -1), ("chgrp", os.chown, "f.db", -1, 4711),
    ("wal", make, "f.db-wal"), ("not a folder", os.stat, "f.db/x"),
):
    result[name] = errno_of(act, *arguments)
os.unlink("f.db-journal")
result["left"] = sorted(os.listdir("."))
"""
    assert client(mount.directory, script) == {
        **dict.fromkeys(("link", "symlink", "fifo", "device", "chown", "chgrp", "wal"), "EPERM"),
        **dict.fromkeys(("setxattr", "getxattr", "listxattr", "removexattr", "xattr of a folder"), "ENOTSUP"),
        **dict.fromkeys(("rename a journal", "rename to a journal"), "EXDEV"),
        **{"file": "OK", "file again": "EEXIST", "journal": "OK", "not a folder": "ENOTDIR"},
        "left": ["d", "f.db", "made"],
    }
    source = Path(mount.spill) / "source"
    source.mkdir()
    (source / "x").write_text("content")
    shell("cp", "-a", source, mount / "copy", check=True)
    shell("mv", source, mount / "moved", check=True)
    assert shell("cat", mount / "copy/x", mount / "moved/x").stdout == "contentcontent"


def test_renaming(mounts: tuple[Mount, Mount]) -> None:
    """Databases and folders move with all they hold, also over others. The kernel takes its cached pages along with the
    name, so what had the old name open gets errors, and the new name never shows the pages of the old one."""
    mount, other = mounts
    rows = "SELECT group_concat(a) FROM t"
    for number, name in enumerate(("a.db", "b.db")):
        sqlite(mount / name, f"CREATE TABLE t(a); INSERT INTO t VALUES ({number})")
    assert sqlite(other / "a.db", rows) == "0"
    shell("mkdir", mount / "d", check=True)
    for old, new in (("a.db", "c.db"), ("c.db", "b.db"), ("b.db", "d/e"), ("d/e", "a.db")):
        shell("mv", mount / old, mount / new, check=True)
        for shown in (mount, other):
            assert sqlite(shown / new, rows, "PRAGMA integrity_check") == "0\nok"
            assert "No such file" in shell("stat", shown / old).stderr
    sqlite(mount / "d/x.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1)")
    with Client(mount / "d/x.db") as reader:
        assert reader(rows) == [["1"]]
        shell("mv", mount / "d", mount / "f", check=True)
        sqlite(mount / "f/x.db", "UPDATE t SET a = 2")
        with pytest.raises(SqlError, match="disk I/O error"):
            reader(rows)
    for shown in (mount, other):
        assert sqlite(shown / "f/x.db", rows) == "2"
    with Client(mount / "a.db") as reader:
        reader("BEGIN")
        assert reader(rows) == [["0"]]
        assert "temporarily unavailable" in shell("mv", mount / "a.db", mount / "g.db").stderr
        reader("COMMIT")
        assert reader(rows) == [["0"]]
        shell("mv", mount / "a.db", mount / "g.db", check=True)
        sqlite(mount / "g.db", "INSERT INTO t VALUES (7)")
        with pytest.raises(SqlError, match="disk I/O error"):
            reader(rows)
        for shown in (mount, other):
            assert sqlite(shown / "g.db", rows, "PRAGMA integrity_check") == "0,7\nok"
    script = """
for version in b"1", b"2":  # as editors save
    os.close(make("new", version))
    os.rename("new", "file")
    result[version.decode()] = [content("file"), sorted(os.listdir("."))]
one = make("held", b"one")
os.fsync(one), os.rename("held", "moved")
result["held"] = [errno_of(os.pread, one, 9, 0), content("moved"), errno_of(os.write, one, b"x"), content("moved")]
result["over a folder"] = errno_of(os.rename, "file", "f")
"""
    assert client(mount.directory, script) == {
        "1": ["1", ["f", "file", "g.db"]],
        "2": ["2", ["f", "file", "g.db"]],
        "held": ["ESTALE", "one", "ESTALE", "one"],
        "over a folder": "EISDIR",
    }


def test_a_read_only_mount(place: Place, tmp_path: Path) -> None:
    with mounted(place, tmp_path) as mount:
        shell("mkdir", mount / "d", check=True)
        sqlite(mount / "a.db", "CREATE TABLE t(a)")
    with mounted(place, tmp_path, "--read-only", "--umask", "022") as mount:
        script = """
for name, act, path in (("mkdir", os.mkdir, "x"), ("rmdir", os.rmdir, "d"), ("mknod", os.mknod, "x"),
                        ("create", make, "x"), ("unlink", os.unlink, "a.db"), ("write", make, "a.db")):
    result[name] = errno_of(act, path)
result["modes"] = [oct(os.stat(path).st_mode) for path in (".", "d", "a.db")]
"""
        expected = dict.fromkeys(("mkdir", "rmdir", "mknod", "create", "unlink", "write"), "EROFS")
        assert client(mount.directory, script) == {**expected, "modes": ["0o40555", "0o40555", "0o100444"]}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users, and use allow_other as it likes")
def test_owner_modes_and_other_users(place: Place) -> None:
    """--uid, --gid and --umask say who may do what; without --allow-other nobody else may even look."""

    def stat(mount: Mount, user: int) -> list[str]:
        done = shell("stat", "-c", "%A %u %g", mount / "a.db", mount / "d", mount.directory, user=user)
        return done.stdout.splitlines()

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name in ("mnt", "spill", "tmp"):
            Path(folder, name).mkdir()
        options = ("--allow-other", "--uid", "4711", "--gid", "4712", "--umask", "027")
        with mounted(place, Path(folder), *options, root=Path(folder)) as mount:
            sqlite(mount / "a.db", "CREATE TABLE t(a)")
            shell("mkdir", mount / "d", check=True)
            for user in (0, 4711):
                assert stat(mount, user) == ["-rw-r----- 4711 4712", "drwxr-x--- 4711 4712", "drwxr-x--- 4711 4712"]
            insert = "INSERT INTO t VALUES (1); SELECT count(*) FROM t"
            assert shell("sqlite3", mount / "a.db", insert, user=4711).stdout == "1\n"
            assert shell("mkdir", mount / "d/new", user=4711).returncode == 0
            assert shell("ls", mount.directory, user=4713, group=4712).stdout == "a.db\nd\n"
            assert "denied" in shell("touch", mount / "x", user=4713, group=4712).stderr
            assert "denied" in shell("ls", mount.directory, user=4713, group=4713).stderr
        with mounted(place, Path(folder), "--umask", "0", root=Path(folder)) as mount:
            assert stat(mount, 0) == ["-rw-rw-rw- 0 0", "drwxrwxrwx 0 0", "drwxrwxrwx 0 0"]
            assert "denied" in shell("ls", mount.directory, user=4711).stderr


@pytest.mark.mount
def test_truncate_by_name(place: Place, tmp_path: Path) -> None:
    """truncate(2) comes without a handle."""
    with mounted(place, tmp_path) as mount:
        script = """
os.close(make("plain", b"long"))
os.truncate("plain", 2)
result["short"] = content("plain")
os.truncate("plain", 3)
result["long again"] = content("plain")
"""
        assert client(mount.directory, script) == {"short": "lo", "long again": "lo\0"}
