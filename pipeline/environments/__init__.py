"""Which interpreter runs what, and how the locked environments are made.

`python3 -m pipeline.environments` makes them with the standard library alone.
"""
