"""Changes of the ledger's tables, in pairs of up and down."""
