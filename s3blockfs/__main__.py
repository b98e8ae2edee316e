"""`python -m s3blockfs` is the `s3blockfs` command."""

from s3blockfs.cli.main import entry

if __name__ == "__main__":
    entry()
