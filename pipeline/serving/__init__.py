"""One server of one unit, in a process or a container, and only of the judged unit.

`serve` starts, watches and stops it. The only room that knows vLLM and container engines.
"""
