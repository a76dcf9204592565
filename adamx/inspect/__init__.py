"""Looking at transformations and at what they do."""
