"""From values alone: nothing is differentiated but the logarithm of a probability."""
