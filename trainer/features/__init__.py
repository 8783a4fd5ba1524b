"""Images as features of a network that was trained to classify them, and how far two sets of features are apart."""
