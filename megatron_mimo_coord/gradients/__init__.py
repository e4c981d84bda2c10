"""From backward to the gradient of the one loss.

Megatron's gradient buckets are touched in this room alone.
"""
