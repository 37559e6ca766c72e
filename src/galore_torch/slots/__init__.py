"""The five places in which methods differ: projector, transport, rule, recovery, carry. One question a file, one table of answers."""
