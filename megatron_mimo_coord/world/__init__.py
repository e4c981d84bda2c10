"""The ranks of the job as one: their device, how long they wait, whether they were told the same.

Of this package this room imports only ``layout``.
"""
