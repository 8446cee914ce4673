"""Invalidations: receive them, and know that none was missed."""
