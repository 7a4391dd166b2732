"""From an approved release to what clients reach: start beside, switch the proxy, drain, set the alias.

`promote` tells the story, `steps` takes each step, `state` writes down what is wanted before it is done.
"""
