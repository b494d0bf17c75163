"""Without second derivatives: cheap, and each biased in its own way."""
