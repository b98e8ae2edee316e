"""pandas: frames to tables and back, over sqlite3 and over SQLAlchemy."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any

import pandas as pd
from calling import main
from sqlalchemy import create_engine

FRAME = pd.DataFrame(
    {
        "city": ["Aachen", "Brugge", None, "Ōsaka"] * 500,
        "when": pd.date_range("2024-01-01", periods=2000, freq="h"),
        "degrees": [float(i % 40) - 9.5 for i in range(2000)],
        "count": range(2000),
    }
)


def frames(path: str) -> Any:
    """Replace, append in chunks, read with parameters and in chunks, and get the same frame back."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
        FRAME.to_sql("weather", db, index=False, if_exists="replace")
        FRAME.head(300).to_sql("weather", db, index=False, if_exists="append", chunksize=100)
        back = pd.read_sql("SELECT * FROM weather LIMIT 2000", db, parse_dates=["when"])
        query = "SELECT city, sum(degrees) AS total FROM weather WHERE city > ? GROUP BY city ORDER BY city"
        totals = pd.read_sql(query, db, params=("B",), index_col="city")["total"].to_dict()
        chunks = [len(chunk) for chunk in pd.read_sql("SELECT * FROM weather", db, chunksize=1000)]
    pd.testing.assert_frame_equal(back, FRAME, check_dtype=False)
    return [totals, chunks]


def expected() -> Any:
    """The same sums without any database."""
    both = pd.concat([FRAME, FRAME.head(300)])
    return both[both.city > "B"].groupby("city")["degrees"].sum().to_dict()


def over_sqlalchemy(path: str) -> Any:
    """With an engine: a table by name, several rows in one statement, and an index column."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    with engine.begin() as connection:
        FRAME.to_sql("weather", connection, index_label="row", method="multi", chunksize=200)
    back = pd.read_sql_table("weather", engine, index_col="row")
    engine.dispose()
    pd.testing.assert_frame_equal(back, FRAME, check_names=False, check_dtype=False)
    return [len(back), back["count"].sum().item(), str(back["when"].dtype).startswith("datetime64")]


if __name__ == "__main__":
    main(globals())
