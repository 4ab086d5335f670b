"""Training on Lightning: data, optimizer, checkpoints, loops. Import the file you need; needs the extra `train`."""
