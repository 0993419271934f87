"""Benchmarks of Rowcast against comparable servers (`make bench`); docs/performance.md explains them."""
