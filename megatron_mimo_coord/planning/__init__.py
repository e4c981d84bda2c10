"""What a layout costs before it runs: simulation, memory, search, drawings, the two commands.

This room imports neither torch nor Megatron, and of this package only ``layout``.
"""
