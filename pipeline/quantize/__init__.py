"""Stage quantize: fewer bits a weight, by a method of the table METHODS.

`quantize` is the stage's program, `check` compares what was written with the original.
"""
