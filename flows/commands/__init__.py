"""What can be typed: one module a group of commands. Prefect is imported in none before it is needed."""
