"""What a trainer does with a coordinator besides the schedule: hooks, optimizer, checkpoints."""
