"""A stage's job on a cluster: the manifests that are applied, and a pod's failure in plain words."""
