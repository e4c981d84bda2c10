"""What a trainer reports: losses, ranges in a profiler, timelines."""
