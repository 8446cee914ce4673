"""Invalidations: hearing them, and knowing that none was missed."""
