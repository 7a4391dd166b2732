"""What a build would do, what of it is done, and what stands in its way.

`plan` decides from digests alone; `code` digests a stage's source; `doctor` and `needs` look at the machine.
"""
