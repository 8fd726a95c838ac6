"""Lightning callbacks of a run: benchmarks, probes, images, exports and reports."""
