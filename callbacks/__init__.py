"""Benchmarks, pictures, and reports that watch a run from outside."""
