"""Statistics, pure: intervals of scores and of load metrics, and the items that a margin needs."""
