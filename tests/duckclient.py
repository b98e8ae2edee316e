"""DuckDB in a process of its own: a statement a line in, a JSON line out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mounting import Client

#: What finds the extension that the package brings, as docs/RECIPES.md does.
INSTALL = "INSTALL '{}'; LOAD sqlite_scanner"


class Duck(Client):
    """A DuckDB connection that stays open. Raises SqlError, as Client does."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where DuckDB installs the extension."""
        line = [sys.executable, __file__, str(folder)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> Iterator[dict[str, Any]]:
    import duckdb
    import duckdb_extension_sqlite_scanner as package

    (extension,) = Path(package.__file__).parent.rglob("*.duckdb_extension")
    connection = duckdb.connect(config={"extension_directory": sys.argv[1]})
    connection.execute(INSTALL.format(extension))
    for line in sys.stdin:
        try:
            yield {"rows": connection.execute(json.loads(line)).fetchall()}
        except duckdb.Error as error:
            yield {"error": str(error)}
    connection.close()


if __name__ == "__main__":
    for answer in main():
        print(json.dumps(answer), flush=True)
