"""Experiments that test the claims of the method at a scale that anyone can run."""
