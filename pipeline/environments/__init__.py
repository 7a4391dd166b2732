"""An interpreter for each stage, and the locked environments.

`python3 -m pipeline.environments` makes them with the standard library alone.
"""
