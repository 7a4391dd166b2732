"""Stage prepare: files in, disjoint train, calibration and holdout rows out.

`prepare` is the stage's program. The others read, check, group and split rows, and report on them.
"""
