"""Measurements that are run by hand, as ``python -m benchmarks.NAME``; ``README.md`` lists them."""
