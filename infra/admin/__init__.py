"""`minga admin`: the tools of the people who hold the federation's keys. Offline, on files."""
