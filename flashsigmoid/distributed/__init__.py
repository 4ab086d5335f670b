"""Attention over several processes: context parallel, what it sends, and plans for our blocks on one DeviceMesh."""
