"""Megatron-Core's insides: the one room that names them, changes them, and undoes it.

Insides are names that Megatron-Core does not promise to keep. Each file is about one subject, and
says what it leans on and what breaks if that goes. The other rooms speak to it in this package's
words.
"""
