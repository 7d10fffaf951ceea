"""One file for each operator: its reference function and its `SPEC`. Found by file name; there is no list."""
