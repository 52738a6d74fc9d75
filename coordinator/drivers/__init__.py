"""What moves on when nobody calls. Drivers and services meet only in the ledger."""
