"""MLflow, and who hears that a review waits. The only room that imports MLflow.

`versions` are model versions and approvals, `runs` a build's record.
"""
