"""One file for each change; the names sort in order."""
