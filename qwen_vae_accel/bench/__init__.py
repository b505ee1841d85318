"""Benchmarks: methods x sizes x encode and decode, measured in one process, a fresh model for each."""
