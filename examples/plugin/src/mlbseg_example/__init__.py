"""A method, a network, a loss and an augmentation for mlbseg."""
