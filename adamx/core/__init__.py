"""The algebra: what a concept is, how it is lifted to a tree, and how concepts are composed."""
