"""What an update costs in memory and time, and how many images it is worth, for any model."""
