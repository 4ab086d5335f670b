"""What is proved about sigmoid attention, as functions in float64: its bias, its regularity, what it can express."""
