"""Noise as whole numbers, and the rounding that makes its sensitivity exact.

    rounding            update -> integers whose norm was checked, exactly
    discrete_gaussian   the law of the noise: an exact slow sampler
    noise_table         the same law as a table: what a node adds to its update
    streams             secret bytes that both read

Integers, because sums of rounded floats reveal what they were rounded from. Pure: whoever calls
brings the seed.
"""
