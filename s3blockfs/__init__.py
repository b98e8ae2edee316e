"""SQLite databases that live in S3 and behave like ordinary local files."""

__version__ = "0.1.0"
