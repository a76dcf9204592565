"""One method a file: each is a composition of the concepts in `adamx.transforms`."""
