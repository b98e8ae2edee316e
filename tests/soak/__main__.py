"""scripts/soak: for as long as is wanted, with a SeaweedFS of its own. The last line says how it ended."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

from mounting import Place
from servers import seaweed

from soak.runner import Failed, Soak, shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, help="of content, pauses and kills; not of what the machine makes of it")
    parser.add_argument("--kill-every", type=float, default=60, metavar="SECONDS", help="a process or daemon")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"soak: seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, seaweed(Path(name) / "s3") as endpoint:
        place = Place(endpoint.url, endpoint.access_key, endpoint.secret_key, "soak")
        place.create_bucket()
        soak = Soak(place, Path(name), random.Random(seed), lambda line: print(line, flush=True))
        try:
            with shown(soak):
                soak.run(given.minutes * 60, given.kill_every)
        except (Failed, AssertionError) as failure:
            print(f"soak: FAILED, seed {seed}: {failure}", flush=True)
            return 1
    print(f"soak: ok, seed {seed}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
