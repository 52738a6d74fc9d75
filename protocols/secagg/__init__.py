"""Secure aggregation: the sum of masked integer vectors, and who may open it.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
malicious-server variant on a complete graph of at most 64 nodes, with signed commits and aborts so
that a round can be tried again after hours of local training. Nothing here does I/O, reads a clock
or draws randomness: seeds and keys are arguments. Normative text: protocols/spec/masked-update.md.

    threshold   how many must agree, and why that is enough        terms of a plan
    shamir      32 secret bytes into n shares, any t of which give them back
    context     the roster and the two digests that everything is bound to
    keys        one attempt's keys, all from one seed
    packets     shares sealed for one peer, each attributable to its dealer
    messages    what is sent, byte for byte; verification of one message
    masks       the key streams, added chunk by chunk
    node        what a node may send, and what must be on disk before
    coordinator what the coordinator may accept
    unmask      taking the masks off the sum
    verify      what an auditor or a node checks again afterwards
"""
