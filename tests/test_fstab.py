"""`mount -o`, and what mount(8) and /etc/fstab make of it."""

from __future__ import annotations

import os
import re
import select
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import PATIENCE_S, Place, clean_up, daemons_of, is_mounted, shell, sqlite

from s3blockfs.cli import main, mount_cmd, options
from s3blockfs.config import Config

Read = Callable[..., Config]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """The settings with which `s3blockfs mount` would serve."""
    for name in os.environ:
        if name.startswith("S3BLOCKFS_"):
            monkeypatch.delenv(name)
    seen: list[Config] = []
    monkeypatch.setattr(mount_cmd, "_serve", lambda *_: seen.append(options.settings().config) or 0)

    def run(*arguments: str) -> Config:
        assert main.main(["mount", "-f", "bucket", "dir", *arguments]) == 0
        return seen.pop()

    return run


# --- -o --------------------------------------------------------------------------------------------------


def test_every_option_of_a_mount_has_its_name_in_fstab(read: Read) -> None:
    given = "cache-size=1M,memory=2M,refresh=0.5,retain=90m,umask=027,uid=7,allow_other,metrics=127.0.0.1:1"
    expected = Config(
        cache_size=1 << 20,
        memory=2 << 20,
        refresh_s=0.5,
        retain_s=5400,
        umask=0o027,
        uid=7,
        allow_other=True,
        metrics="127.0.0.1:1",
    )
    assert read("-o", given) == read("-o", given.replace("-", "_")) == expected
    for option in [*options.CONFIG.values(), options.LOCAL, *options.COMMON]:
        needs_a_value = "" if option.is_flag else "="
        assert main.main(["mount", "-o", f"{option.opts[0][2:]}{needs_a_value}", "--help", "bucket", "dir"]) == 0


@pytest.mark.parametrize(
    ("text", "read_only"),
    [
        ("ro", True),
        ("rw", False),
        ("defaults,_netdev,nofail,noauto,user,x-systemd.automount,X-a=b,nodev,nosuid,noexec,relatime,noatime", False),
        ("auto,,nouser,users,user=jo,dev,suid,exec,async,comment=anything at all,ro,", True),
    ],
)
def test_what_mount_8_passes_on(read: Read, text: str, read_only: bool) -> None:
    assert read("-o", text) == Config(read_only=read_only)


def test_flags_win_over_fstab_which_wins_over_the_environment(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3BLOCKFS_CACHE_SIZE", "1K")
    monkeypatch.setenv("S3BLOCKFS_REFRESH", "1")
    monkeypatch.setenv("S3BLOCKFS_MEMORY", "1K")
    config = read("--memory", "3K", "-o", "memory=2K", "-orefresh=2", "-o", "uid=1,uid=2")
    assert (config.cache_size, config.refresh_s, config.memory, config.uid) == (1 << 10, 2, 3 << 10, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cache", "'cache' is unknown"),
        ("remount", "'remount' is unknown"),
        ("cache-size", "cache-size needs a value"),
        ("ro=1", "ro takes no value"),
        ("allow_other=yes", "allow_other takes no value"),
        ("cache-size=big", "'big' is no size"),
        ("retain=1m", "write 1h or more"),
        ("metrics=0.0.0.0:1", "no address of this machine"),
        ("help", "'help' is unknown"),
        ("o=ro", "'o=ro' is unknown"),
    ],
)
def test_options_that_cannot_be_used(capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    assert main.main(["mount", "-f", "bucket", "dir", "-o", text]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.endswith("; see `s3blockfs mount --help`\n")
    assert shown.count("\n") == 1


def test_sloppy_ignores_what_is_unknown(read: Read) -> None:
    assert read("-o", "whatever,ro", "-o", "sloppy") == Config(read_only=True)


# --- mount(8) --------------------------------------------------------------------------------------------


@pytest.fixture
def kind() -> Iterator[str]:
    """A file system type that only this test knows: `/sbin/mount.<kind>` leads to the installed console script."""
    if os.geteuid():
        pytest.skip("only root may put a helper into /sbin")
    name = f"s3blockfs_{uuid.uuid4().hex[:8]}"
    link = Path("/sbin") / f"mount.{name}"
    link.symlink_to(Path(sys.executable).parent / "mount.s3blockfs")
    try:
        yield name
    finally:
        link.unlink()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    clean_up(path)


def mount(place: Place, *arguments: str | Path) -> str:
    """The exit code and what mount(8) says."""
    done = shell("mount", *arguments, env=place.environment)
    return f"{done.returncode} {done.stderr}"


def umount(directory: Path) -> None:
    """umount(8), and the end of the daemon."""
    daemons = [os.pidfd_open(pid) for pid in daemons_of(directory)]
    assert daemons
    done = shell("umount", directory)
    assert done.returncode == 0, done.stderr
    for daemon in daemons:
        assert select.select([daemon], [], [], PATIENCE_S)[0], "the daemon goes on"
        os.close(daemon)


@pytest.mark.mount
def test_mount_8_and_umount_8(place: Place, kind: str, directory: Path, tmp_path: Path) -> None:
    wanted = f"endpoint-url={place.url},spill_dir={tmp_path},refresh=0,nosuid,nofail"
    assert mount(place, "-v", "-t", kind, f"s3://{place.target}", directory, "-o", wanted) == "0 "
    assert is_mounted(directory)
    assert sqlite(directory / "a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (7); SELECT * FROM t") == "7"
    umount(directory)
    assert "a.db/head" in place.listing()
    assert mount(place, "-n", "-r", "-t", kind, f"s3://{place.target}", directory, "-o", wanted) == "0 "
    assert sqlite(directory / "a.db", "SELECT * FROM t") == "7"
    assert "readonly" in sqlite(directory / "a.db", "INSERT INTO t VALUES (8)", check=False)
    umount(directory)


@pytest.mark.mount
def test_a_line_of_fstab(place: Place, kind: str, directory: Path, tmp_path: Path) -> None:
    wanted = f"_netdev,noauto,x-systemd.automount,user,endpoint_url={place.url},cache_size=16M"
    fstab = tmp_path / "fstab"
    fstab.write_text(f"s3://{place.target} {directory} {kind} {wanted} 0 0\n")
    assert mount(place, "--fstab", fstab, directory) == "0 "
    sqlite(directory / "a.db", "CREATE TABLE t(a)")
    assert mount(place, "--fstab", fstab, directory).startswith("2 s3blockfs: ")  # as always: mounted there already
    umount(directory)
    assert "a.db/head" in place.listing()


@pytest.mark.mount
@pytest.mark.parametrize("document", ["README.md", "docs/OPERATIONS.md"])
def test_the_line_of_the_documents(document: str, place: Place, kind: str, directory: Path, tmp_path: Path) -> None:
    """With this bucket, folder and type, and this server for S3."""
    text = (Path(__file__).resolve().parent.parent / document).read_text()
    (line,) = re.findall(r"^    (s3://\S+ +/\S+ +s3blockfs +\S+ +0 0)$", text, re.MULTILINE)
    options = line.split()[3]
    fstab, keys = tmp_path / "fstab", tmp_path / "credentials"
    fstab.write_text(f"s3://{place.target} {directory} {kind} {options},noauto,endpoint-url={place.url} 0 0\n")
    (profile,) = re.findall(r"profile=(\w+)", options)
    secret = f"aws_access_key_id={place.access_key}\naws_secret_access_key={place.secret_key}\nregion=us-east-1\n"
    keys.write_text(f"[{profile}]\n{secret}")
    environment = {k: v for k, v in place.environment.items() if not k.startswith("AWS_")}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(keys), "AWS_CONFIG_FILE": os.devnull}
    done = shell("mount", "--fstab", fstab, directory, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    sqlite(directory / "a.db", "CREATE TABLE t(a)")
    umount(directory)
    assert "a.db/head" in place.listing()


@pytest.mark.mount
def test_what_mount_8_says_of_a_mistake(place: Place, kind: str, directory: Path) -> None:
    source = f"s3://{place.target}"
    said = mount(place, "-t", kind, source, directory, "-o", "cash-size=1M")
    assert said == "2 s3blockfs: mount option 'cash-size=1M' is unknown; see `s3blockfs mount --help`\n"
    wanted = f"endpoint-url={place.url},cash-size=1M"
    assert mount(place, "-f", "-t", kind, source, directory, "-o", wanted) == "0 "  # -f: fake
    assert not is_mounted(directory)
    assert mount(place, "-s", "-t", kind, source, directory, "-o", wanted) == "0 "  # -s: sloppy
    umount(directory)
