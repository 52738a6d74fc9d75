"""`minga governance`: the charter against what is signed."""
