"""The kill sweep: a process dies at the k-th request to S3 of what it does, for every k. See `sweep.py`."""
