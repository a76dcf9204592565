"""Converting another library's state to adamx's and back, in the middle of a run."""
