"""Builds the embedded model, its judge and its preference model; run from a checkout."""
