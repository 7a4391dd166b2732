"""What a reviewer reads: one renderer for the model card, MLflow's page and Prefect's artifacts."""
