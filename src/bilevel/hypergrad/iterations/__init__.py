"""Through the steps of the inner solver: exact, or exact for the last of them."""
