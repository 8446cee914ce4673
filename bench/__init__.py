"""What mnemobus costs, compared with its alternatives: ``make bench``. See docs/benchmarks.md."""
