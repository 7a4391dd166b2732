"""Stage merge: an adapter folded into the base's weights, or into what 4-bit training saw."""
