"""The algebra: concepts for one array, their lifting to a tree, and their composition."""
