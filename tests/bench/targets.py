"""What each workload is to reach (the owner's figures), and which other line a time is a ratio to."""

from __future__ import annotations

from bench.table import Target, against, least, most

MOUNT, PROCESS, EXCLUSIVE = "s3blockfs mount", "s3blockfs in process", "s3blockfs mount --exclusive"
FLOORS = {
    "W1": "boto3 alone",
    "W2": "whole file",
    "W3": "local file",
    "W4": "boto3 alone",
    "W5": "local file",
    "W6": "whole file",
    "W7": "boto3 alone",
    "W8": "whole file",
    "W9": "whole file",
    "W10": "whole file",
    "W11": "boto3 alone",
    "W16": "boto3 alone",
}


def floor_of(workload: str, who: str) -> str:
    """The line whose time is 1 for this one: the same way of doing it (after the comma), by the floor."""
    floor = FLOORS.get(workload, "")
    _, comma, way = who.partition(", ")
    if workload == "W1" and way:
        return "boto3 alone, import boto3, apsw"
    return floor if workload == "W16" else floor + comma + way


def _requests() -> list[Target]:
    found = []
    for who in (MOUNT, PROCESS):
        found += [
            most("W1", who, "requests", 5, "≤ 5 requests"),
            most("W1", who, "trips", 4, "≤ 4 round trips"),
            most("W1", who, "down", 1, "≤ 1 MB", "{:.2f} MB"),
            most("W2", who, "gets", 100, "≤ 100 GETs"),
            most("W2", who, "down", 105, "≤ 105 MB", "{:.1f} MB"),
            against("W2", who, "whole file", 1, "faster than the whole file"),
            against("W2", who, "rclone mount", 1, "faster than rclone"),
            most("W4", who, "gets", 40, "≤ 40 GETs"),
            most("W4", who, "down", 105, "≤ 105 MB", "{:.1f} MB"),
            against("W4", who, "boto3 alone", 1.5, "≤ 1.5x boto3"),
            most("W5", who, "requests", 0, "0 requests"),
            most("W6", who, "puts", 35, "≤ 35 PUTs"),
            least("W6", who, "sent before COMMIT", 0.5, "uploads overlap the inserts", "{:.0%} sent before COMMIT"),
            most("W7", who, "puts", 206, "≤ 206 PUTs"),
            most("W7", who, "gets", 0, "0 GETs"),
            against("W7", who, "boto3 alone", 1.2, "≤ 1.2x 200 PUTs"),
            most("W8", who, "puts", 8, "≤ 8 PUTs"),
            most("W8", who, "gets", 120, "≤ 120 GETs"),
            most("W9", who, "puts", 35, "≤ 35 PUTs"),
            most("W9", who, "gets", 40, "≤ 40 GETs"),
            most("W10", who, "gets", 60, "≤ 60 GETs"),
            against("W10", who, "rclone mount", 1, "faster than rclone"),
        ]
        for way in ("one transaction", "autocommit"):
            found.append(most("W3", f"{who}, {way}", "requests", 0, "0 requests"))
    return found


TARGETS = [
    *_requests(),
    most("W1", f"{MOUNT}, until it is ready", "seconds", 1, "≤ 1 s", "{:.2f} s"),
    against("W3", f"{MOUNT}, one transaction", "local file, one transaction", 1.3, "≤ 1.3x local"),
    against("W3", f"{MOUNT}, autocommit", "local file, autocommit", 4, "≤ 4x local"),
    against("W3", f"{EXCLUSIVE}, one transaction", "local file, one transaction", 1.3, "≤ 1.3x local"),
    against("W3", f"{EXCLUSIVE}, autocommit", "local file, autocommit", 1.3, "≤ 1.3x local"),
    against("W3", f"{PROCESS}, one transaction", "local file, one transaction", 2, "≤ 2x local"),
    against("W3", f"{PROCESS}, autocommit", "local file, autocommit", 2, "≤ 2x local"),
    against("W5", MOUNT, "local file", 1.3, "≤ 1.3x local"),
    against("W5", PROCESS, "local file", 3, "≤ 3x local"),
    against("W6", MOUNT, "whole file", 3, "≤ 3x local + upload"),
    against("W6", PROCESS, "whole file", 1.5, "≤ 1.5x local + upload"),
    Target(
        "W1",
        f"{PROCESS}, import",
        "≤ 50 ms above boto3, apsw",
        lambda line, lines: (
            1000 * (line.seconds - lines.of("W1", "boto3 alone, import boto3, apsw").seconds)
            if lines.has("W1", "boto3 alone, import boto3, apsw")
            else None
        ),
        lambda found: found <= 50,
        "{:.0f} ms",
    ),
    most("W11", f"{PROCESS}, import", "puts", 30, "≤ 30 PUTs"),
    most("W11", f"{PROCESS}, export", "gets", 30, "≤ 30 GETs"),
    against("W11", f"{PROCESS}, import", "boto3 alone, import", 1.25, "≥ 80 % of boto3"),
    against("W11", f"{PROCESS}, export", "boto3 alone, export", 1.25, "≥ 80 % of boto3"),
    *(
        Target(
            "W14",
            f"{who}, 1 TB",
            "as many requests as with 1 MB",
            lambda line, lines, who=who: line.requests - lines.of("W14", f"{who}, 1 MB").requests,  # type: ignore[misc]
            lambda found: found <= 0,
            "{:+.0f}",
        )
        for who in (MOUNT, PROCESS)
    ),
    *(most("W14", f"{who}, 1 TB", "MB it grew", 50, "grows by ≤ 50 MB", "{:.1f} MB") for who in (MOUNT, PROCESS)),
    most("W15", f"{PROCESS}: ls ", "gets", 0, "LISTs only", "{:.0f} GETs"),
    most("W15", f"{PROCESS}: ls ", "seconds", 3, "≤ 3 s", "{:.1f} s"),
    most("W15", f"{PROCESS}: ls -l", "gets", 10_000, "one GET each"),
    most("W15", f"{PROCESS}: ls -l", "GETs without a range", 0, "ranged", "{:.0f} without"),
    least("W15", f"{PROCESS}: ls -l", "at once", 64, "64 in parallel", "{:.0f}"),
    most("W15", f"{PROCESS}: ls -l", "seconds", 20, "≤ 20 s", "{:.1f} s"),
    most("W16", f"{MOUNT}, 16 threads", "MB fetched twice", 0, "no slot fetched twice", "{:.2f} MB"),
    against("W16", f"{MOUNT}, 16 threads", "boto3 alone", 1.5, "≤ 1.5x boto3 (W4's: no figure was set)"),
    least("W17", PROCESS, "commits", 1e6, "1,000,000 commits", "{:,.0f}"),
    most("W17", PROCESS, "PUTs a commit", 1.05, "≤ 1.05 PUTs a commit", "{:.3f}"),
    most("W17", PROCESS, "KiB a commit", 300, "≤ 300 KiB a commit"),
    most("W17", PROCESS, "times live", 3, "garbage < 2x live", "all {:.2f}x live"),
    most("W18", MOUNT, "requests", 0, "0 requests"),
]
