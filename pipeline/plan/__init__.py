"""A build before it runs: its stages, those already done, and whatever stands in its way.

`plan` decides from digests alone; `code` digests a stage's source; `doctor` and `needs` look at the machine.
"""
