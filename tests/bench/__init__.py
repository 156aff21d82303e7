"""Benchmarks: started by hand, never collected by pytest."""
