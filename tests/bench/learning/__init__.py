"""``make bench-learning``: what federated training learns, beside what it is compared with."""
