"""Foreign signatures in, ours out: one guest interface per file. Nothing is gathered here and no guest is imported."""
