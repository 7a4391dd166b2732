"""Stage base: a base model is located, checked and copied. Other rooms read model folders with these modules.

`base` is the stage's program. GGUF files, checkpoints, tokenizers and licences are read here.
"""
