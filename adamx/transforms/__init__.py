"""One concept a file: each opens with its formula and its source."""
