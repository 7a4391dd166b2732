"""Stage quantize: fewer bits a weight, by a method of the table METHODS (pipeline/config/methods.py).

`quantize` is the stage's program, `check` compares what was written with the original.
"""
