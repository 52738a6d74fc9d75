"""Opening a sum: adding up the survivors' vectors and taking the outer step."""
