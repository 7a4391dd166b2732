"""One server of one unit: a process or a container, and only of what was judged.

`serve` starts, watches and stops it. The only room that knows vLLM and container engines.
"""
