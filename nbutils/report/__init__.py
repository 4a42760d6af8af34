"""What this repository says of itself: README, speed, other libraries."""
