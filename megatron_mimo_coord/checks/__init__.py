"""What a coordinator is given: is it the same job on all ranks, is each module as it must be?"""
