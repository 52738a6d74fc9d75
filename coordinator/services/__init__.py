"""gRPC services: who, what, when, one named transaction. They keep nothing between calls."""
