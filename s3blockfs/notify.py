"""Tell systemd (Type=notify) that we are ready, over the socket that $NOTIFY_SOCKET names, if it does; sd_notify(3)."""

import os
import socket

from s3blockfs.errors import EnvironmentProblem


def ready(status: str) -> None:
    """The mount can be used; `status` is what `systemctl status` shows.
    Raises EnvironmentProblem when the socket is named but nobody takes the message."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    # "@" stands for the NUL byte of Linux's abstract namespace, which an environment variable cannot hold.
    target = "\0" + address[1:] if address.startswith("@") else address
    message = "READY=1\nSTATUS=" + status.replace("\n", " ")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(message.encode(), target)
    except OSError as error:
        raise EnvironmentProblem(f"$NOTIFY_SOCKET {address}: {error.strerror or error}; unset it, or fix it") from error
