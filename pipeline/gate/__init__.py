"""Reports and a policy in, a verdict out: pass, fail or inconclusive. Pure: no file, no clock, no network.

`gate` has the whole rule in its docstring; `decide` counts failures over families of questions.
"""
