"""The loss ledger: which step of a model's making lost quality, on the same items.

`answers` is the stage's program, `scores` scores what it wrote, `compare` reads the steps side by side.
"""
