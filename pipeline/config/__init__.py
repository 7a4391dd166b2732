"""Everything a person may choose, as one typed schema.

`schema` holds the sections, `file` reads a YAML file into them and names every mistake with its line. No torch, no Prefect.
"""
