"""Stage base: a base model is located, checked and copied. Other rooms ask here what a model folder is.

`base` is the stage's program. GGUF files, checkpoints, tokenizers and licences are read here.
"""
