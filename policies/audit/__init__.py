"""What an auditor checks, as pure functions over leaves, blobs and signed documents."""
