"""Measurements of mnemobus beside what one would take instead."""
