"""Statistics, pure: intervals of proportions, scores, macro-F1 and load metrics, and the items that a comparison needs."""
