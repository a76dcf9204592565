"""From the state of another library to one of adamx, in the middle of a run, and back."""
