"""Activations between modules.

Megatron's communicators are touched in this room alone.
"""
