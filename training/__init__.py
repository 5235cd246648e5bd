"""What moves the align module: losses, optimizer, schedule, checkpoints, logs."""
