"""A 2-D mixture on which the parts of GARDO are compared: ``python -m experiments.mixture``.

The protocol, written before the reported runs, and their results are in
``docs/experiments/mixture.md``.
"""
