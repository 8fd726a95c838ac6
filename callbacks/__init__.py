"""Benchmarks, images, and reports that watch a run from outside."""
