"""``python -m megatron_mimo_coord`` is ``mimo-layout``."""

from megatron_mimo_coord.planning.layout_command import main

main()
