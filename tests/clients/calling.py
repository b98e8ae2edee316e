"""Each program here is a client of a mount that knows nothing of s3blockfs: `with_x.py FUNCTION ARGUMENT...` calls one
of its functions and prints what that returns as JSON. Tests run them by `clienting.run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def main(functions: Mapping[str, Any]) -> None:
    name, *arguments = sys.argv[1:]
    print(json.dumps(functions[name](*arguments)))
