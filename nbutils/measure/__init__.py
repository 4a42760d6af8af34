"""What an update costs and what it is worth, for any model."""
