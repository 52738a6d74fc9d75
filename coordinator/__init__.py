"""The coordinator: gRPC services and drivers that meet only in the ledger."""
