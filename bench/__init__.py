"""What mnemobus costs, beside what a user would take instead: ``make bench``. See docs/benchmarks.md."""
