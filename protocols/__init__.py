"""What institutions must agree on, byte for byte.

Pure functions and values: no input or output, no clock, no ambient randomness. Time, random bytes
and keys are arguments, so that a node, the coordinator and an auditor who run the same code on the
same bytes reach the same answer. Normative text is in ``protocols/spec``.
"""
