"""Builds the embedded model and its judge; run from a checkout."""
