"""Stage finetune: QLoRA over packed rows, on a CPU, a GPU or several.

`train` is the stage's program; `launch` and `rank` spread it over processes. `execution` chooses how a run is run, `model` applies it.
`objectives` is the table of rows and losses.
"""
