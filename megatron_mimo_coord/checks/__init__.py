"""What a coordinator is given: is it the same job on all ranks, is each module as it must be, and
is the installed Megatron-Core the one that this package was written for?
"""
