"""A stage's job on a cluster: where a stage runs, the manifests that are applied, and a pod's failure in plain words."""
